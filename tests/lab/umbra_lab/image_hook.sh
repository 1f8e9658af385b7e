#!/bin/sh
# mmdebstrap's customize hook: runs outside of the image, whose root is $1. $LAB_PACKAGES: names of packages.txt
# or of its like for another release; $LAB_RELEASE: that release.
set -eu
root=$1

# A local repository of the packages and their dependencies: hosts install for real with no way out, and
# `apt-get update` works there. Downloaded by the outer apt, which knows how this machine reaches a mirror.
# shellcheck disable=SC2086
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get --yes -qq -o APT::Keep-Downloaded-Packages=true \
    install --download-only $LAB_PACKAGES
repository=$root/var/lib/lab-packages
mkdir "$repository"
mv "$root"/var/cache/apt/archives/*.deb "$repository"
(
    cd "$repository"
    apt-ftparchive packages . >Packages
    apt-ftparchive -o APT::FTPArchive::Release::Codename="$LAB_RELEASE" -o APT::FTPArchive::Release::Origin=lab release . >../Release
    mv ../Release Release
)
rm -rf "$root"/var/lib/apt/lists/* "$root/etc/apt/sources.list" "$root"/etc/apt/sources.list.d/*
cat >"$root/etc/apt/sources.list.d/lab.sources" <<'END'
Types: deb
URIs: file:/var/lib/lab-packages
Suites: ./
Trusted: yes
END
chroot "$root" apt-get -qq update

# A lab host's packages need not outlive a power cut of the machine: dpkg syncs no file of theirs.
mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/lab"

# Each host gets its own of these.
rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/machine-id" "$root/var/lib/dbus/machine-id" "$root/etc/hostname"

# No name server: an unknown name is refused by 127.0.0.1 at once.
rm -f "$root/etc/resolv.conf"
echo '# The lab has no name server; names are in /etc/hosts.' >"$root/etc/resolv.conf"

echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
mkdir -p "$root/etc/ssh/sshd_config.d"
cat >"$root/etc/ssh/sshd_config.d/lab.conf" <<'END'
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UseDNS no
END

# Not needed in a container, or only busy at the wrong moment.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer getty.target console-getty.service systemd-timesyncd.service systemd-networkd-wait-online.service \
    systemd-firstboot.service systemd-update-utmp.service systemd-udev-trigger.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
