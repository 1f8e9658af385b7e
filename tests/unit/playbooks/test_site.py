"""What umbra.mail.site does in which order, and with which tags."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from .conftest import INVENTORY, ROOT, Play

ROLES = ("vpn", "mail_server", "replication_agent", "coordinator")


class Task(NamedTuple):
    role: str
    name: str
    tags: list[str]


def tasks(play: Play, *arguments: str) -> list[Task]:
    """The tasks of the playbook, without those that judge arguments."""
    run = play("umbra.mail.site", "--list-tasks", *arguments)
    assert run.code == 0
    found = re.findall(r"(?m)^      (?:umbra\.mail\.(\w+) : )?(.*)\tTAGS: \[(.*)\]$", run.output)
    return [
        Task(role, name, tags.split(", "))
        for role, name, tags in found
        if not name.startswith("Validating arguments")
    ]


def places(found: list[Task], words: str) -> list[int]:
    return [place for place, task in enumerate(found) if task.name.startswith(words)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tags", "mail_server"],
        ["--tags", "mail_server_install"],
        ["--tags", "mail_server_service"],
        ["--skip-tags", "replication_agent"],
        [],
    ],
)
def test_no_mail_service_is_there_before_the_fence(play: Play, arguments: list[str]) -> None:
    found = tasks(play, *arguments)
    (fence,) = places(found, "Close the service ports, now and at every boot")
    services = [*places(found, "Install Postfix and Dovecot"), *places(found, "Start Dovecot")]
    assert services
    assert fence < min(services)


def test_groups_of_an_inventory_that_are_called_like_ours(play: Play) -> None:
    others = ("__umbra_shadow", "__umbra_primary", "site_shadow", "site_primary", "site_node")
    groups = "".join(f"{name}: {{hosts: {{stranger: {{}}}}}}\n" for name in others)
    run = play("umbra.mail.site", "--list-hosts", inventory=INVENTORY + groups)
    assert "Bring the mail hosts up" in run.output
    assert "stranger" not in run.output


def test_every_tag_of_the_mail_server_checks_the_settings_first(play: Play) -> None:
    found = [task for task in tasks(play) if task.role == "mail_server"]
    check = found[min(places(found, "Check the mailboxes and aliases"))]
    assert {tag for task in found for tag in task.tags} == set(check.tags)


def test_every_tag_of_a_readme_selects_something(play: Play) -> None:
    found = tasks(play)
    for role in ROLES:
        text = (ROOT / "roles" / role / "README.md").read_text().partition("\n## Tags\n")[2]
        documented = set(re.findall(r"`([a-z_]+)`", text))
        assert documented
        selected = {tag for task in found if task.role == role for tag in task.tags}
        # With any tags, so with this one.
        selected |= {"fence"} if role == "replication_agent" and "always" in selected else set()
        assert documented <= selected, role


def test_what_can_be_refused_comes_before_what_is_installed(play: Play) -> None:
    found = tasks(play)
    start = places(found, "Measure the round trips")[0]
    agent = [task for task in found[start:] if task.role == "replication_agent"]
    first = min(places(agent, "Pin the certificates") + places(agent, "Install the agent"))
    assert places(agent, "Refuse")
    assert max(places(agent, "Refuse")) < first
    (command,) = places(found, "Refuse a command that could not run")
    assert command < min(places(found, "Install the mail packages") + places(found, "Install Post"))


FENCE = """\
- name: Fence
  hosts: mail-a
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: umbra.mail.replication_agent, tasks_from: fence}
"""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", ""),
        ('"replication_agent_fence_ports": [25, 465, 587, 993, 4190]', "lacks 110, 143, 995,"),
        ('"replication_agent_fence_ports": [465, "587", 143, 993, 110, 995, 4190]', "lacks 25,"),
        (
            '"replication_agent_fence_ports": ["25", 465, 587, 143, 993, 443],'
            ' "mail_server_protocols": ["imap", "lmtp"]',
            "",
        ),
    ],
)
def test_a_fence_closes_what_the_mail_server_opens(play: Play, settings: str, words: str) -> None:
    run = play(FENCE, "--check", "-e", f"{{{settings}}}")
    refused = "replication_agent_fence_ports lacks" in run.words
    assert (refused, words in run.words) == (bool(words), True), run.output


def test_the_fence_is_judged_before_it_is_written(play: Play) -> None:
    found = tasks(play, "--skip-tags", "replication_agent")
    (judged,) = places(found, "Refuse a fence")
    assert judged < min(places(found, "Write the fence"))


COMMAND = """\
- name: Preflight
  hosts: mail-a
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: umbra.mail.replication_agent, tasks_from: preflight}
"""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ('"/bin/true --site alpha"', "is '/bin/true --site alpha'; write a list, the program"),
        ('["/bin/no-such-file"]', "/bin/no-such-file has to be on mail-a"),
    ],
)
def test_a_command_that_could_not_run(play: Play, command: str, words: str) -> None:
    run = play(
        *(COMMAND, "--start-at-task", "Refuse a command that is no list"),
        *("-e", f'{{"replication_agent_stonith_command": {command}}}'),
    )
    assert run.code != 0
    assert words in run.words


PROFILE = """\
- name: Profile
  hosts: mail-a
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: umbra.mail.replication_agent, tasks_from: profile}
"""


@pytest.mark.parametrize(
    ("milliseconds", "code", "words"),
    [
        (1, 0, "Refuse a profile that is not safe"),
        (150, 2, "mail-a: Profile default: the round trip of 150 ms is over"),
    ],
)
def test_a_profile_is_judged_before_there_is_an_agent(
    play: Play, milliseconds: int, code: int, words: str
) -> None:
    run = play(
        *(PROFILE, "--check", "-e", f"__replication_agent_round_trip={milliseconds}"),
        inventory="all: {hosts: {mail-a: {}}, vars: {vpn_overlay_subnet: 10.86.0.0/24}}\n"
        "umbra_nodes: {hosts: {mail-a: {}}}",
    )
    assert run.code == code
    assert words in run.words


def test_an_inventory_that_becomes_root_does_not_on_the_controller(play: Play) -> None:
    run = play(
        *(PROFILE, "--check", "-e", "__replication_agent_round_trip=1"),
        inventory="all: {hosts: {mail-a: {}}, vars: {vpn_overlay_subnet: 10.86.0.0/24,"
        " ansible_become: true, ansible_become_user: nobody, ansible_become_exe: /bin/false}}\n"
        "umbra_nodes: {hosts: {mail-a: {}}}",
    )
    assert run.code == 0, run.output
