"""What umbra.mail.site does in which order, and with which tags."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import yaml

from .conftest import INVENTORY, ROOT, Play

ROLES = ("vpn", "mail_server", "replication_agent", "coordinator")


PLAYS: Any = yaml.safe_load((ROOT / "playbooks" / "site.yml").read_text())


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
    fence = min(places(found, "Close the service ports, now and at every boot"))
    services = [*places(found, "Install Postfix and Dovecot"), *places(found, "Start Dovecot")]
    assert services
    assert fence < min(services)


def test_a_host_that_fails_ends_the_run_before_the_primary_has_its_turn() -> None:
    names = [play["name"] for play in PLAYS]
    early = PLAYS[1 : names.index("Bring the mail hosts up, one by one")]
    assert len(early) == 4
    # Which counts failed hosts, and not those that are down.
    assert [play.get("max_fail_percentage") for play in early] == [0] * 4


def test_what_was_protected_is_asked_before_anything_is_changed() -> None:
    names = [play["name"] for play in PLAYS]
    assert names[:2] == ["Judge the inventory", "Find out who is primary now"]


def test_what_has_changed_is_applied_before_protection_is_waited_for(play: Play) -> None:
    found = tasks(play, "--tags", "configure")
    (wait,) = places(found, "Wait until the group is protected")
    assert found[wait - 1].name == "Apply what has changed"


ORDER = yaml.safe_dump(
    [
        {
            "name": "Order",
            "hosts": "umbra_nodes",
            "gather_facts": False,
            "tasks": [task for task in PLAYS[1]["tasks"] if "group_by" in str(task)][:1],
        },
        {
            "name": "Say",
            "hosts": "__umbra_primary",
            "gather_facts": False,
            "tasks": [{"ansible.builtin.debug": {"msg": "{{ inventory_hostname }} is the last"}}],
        },
    ]
)


@pytest.mark.parametrize(
    ("protected_set", "cause", "lag", "passed"),
    [
        (["mail-b"], "mail-a waits for mail-b; this node follows", 0, True),
        (["mail-b"], "mail-a waits for mail-b; this node follows", 3, True),
        (["mail-b"], "mail-a waits for mail-b; this node follows", 200, False),
        (["mail-b"], "mail-a has not taken this node into the protected set", 0, False),
        (["mail-b", "mail-c"], "", 0, True),
    ],
)
def test_of_three_hosts_the_one_that_was_changed_is_waited_for(
    play: Play, protected_set: list[str], cause: str, lag: int, passed: bool
) -> None:
    """Whoever protects the group meanwhile says nothing of it."""
    (wait,) = [
        task for task in PLAYS[-2]["tasks"] if task["name"].startswith("Wait until the group")
    ]
    nodes = [
        {"node": "mail-a", "role": "primary", "cause": "", "lag_changes": 0, "lag_s": 0.0},
        {"node": "mail-b", "role": "shadow", "cause": "", "lag_changes": 0, "lag_s": 0.0},
        {"node": "mail-c", "role": "shadow", "cause": cause, "lag_changes": lag, "lag_s": 0.2},
    ]
    answer = {"protected": True, "nodes": nodes, "protected_set": protected_set}
    asked = {
        "name": "Ask",
        "hosts": "mail-c",
        "gather_facts": False,
        "vars": {
            "site_after": {"status": 200, "json": answer},
            "site_own": wait["vars"]["site_own"],
        },
        "tasks": [{"ansible.builtin.debug": {"msg": "waited: {{ " + wait["until"] + " }}"}}],
    }
    run = play(yaml.safe_dump([asked]), inventory="all: {hosts: {mail-c: {}}}")
    assert f"waited: {passed}" in run.output, run.output


@pytest.mark.parametrize(
    ("a", "b", "last"),
    [
        ({}, {}, "mail-a"),
        ({}, {"primary": "mail-b", "epoch": 2}, "mail-b"),
        ({"primary": None, "epoch": 1}, {"primary": "mail-b", "epoch": 2}, "mail-b"),
        ({"primary": "mail-a", "epoch": 1}, {"primary": "mail-b", "epoch": 2}, "mail-b"),
        ({}, {"primary": None, "epoch": 2}, "mail-a"),
        ({}, {"primary": "mail-b", "epoch": 2, "group": "post"}, "mail-a"),
    ],
)
def test_the_primary_is_whom_any_node_knows(
    play: Play, a: dict[str, Any], b: dict[str, Any], last: str
) -> None:
    hosts: dict[str, Any] = {
        "mail-a": {"umbra_role": "primary"},
        "mail-b": {"umbra_role": "shadow"},
    }
    for host, answer in zip(hosts.values(), (a, b), strict=True):
        host["site_status"] = {"status": -1}
        if answer:
            host["site_status"] = {"status": 200, "json": {"group": "mail", **answer}}
    groups = {"umbra_nodes": {"hosts": hosts, "vars": {"umbra_group": "mail"}}}
    run = play(ORDER, inventory=yaml.safe_dump(groups))
    assert re.findall(r"(mail-.) is the last", run.output) == [last], run.output


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
    (settings,) = places(found, "Refuse what the agent would refuse")
    assert settings < min(places(found, "Install the mail packages"), default=10**6)
    first = min(places(found, "Check that lists are lists"))
    assert first < min(places(found, "Install the mail packages"), default=10**6)
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


PAIR = """\
all: {vars: {vpn_overlay_subnet: 10.86.0.0/24, umbra_group: mail, umbra_site: alpha}}
umbra_nodes: {hosts: {mail-a: {umbra_role: primary}, mail-b: {umbra_role: shadow}}}
"""
AGENT = "replication_agent_"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", ""),
        (f'"{AGENT}heartbeat_timeout": 0.5', "heartbeat.timeout is 0.5 s; it must be over"),
        (f'"{AGENT}fence_hold": 1', "fence.hold is 1 s; under 2 s a busy agent would close"),
        (f'"{AGENT}shadow_copies": 2', "transport.shadow_copies is 2, but only 1 of the peers"),
        (f'"{AGENT}shadow_timeout": 61', "transport.shadow_timeout is 61 s; over 60 s Postfix"),
        (f'"{AGENT}mirror_workers": 65', "mailbox.mirror_workers is 65; it must be 0 to 64"),
        (f'"{AGENT}client_probes": ["gateway"]', "handover.client_probes has 'gateway'; it must"),
        (f'"{AGENT}handover_free": -1', "handover.free must be a whole number from 0, not -1."),
        (f'"{AGENT}fence_ports": [25, "465"]', "fence.ports must be a whole number from 0, not '4"),
        ('"umbra_group": 7', "group must be a text, not 7."),
        ('"umbra_site": 1', "site must be a text, not 1."),
        (f'"{AGENT}coordinator": "etcd"', "coordinator.endpoints names 2 voters; coordinator.kin"),
    ],
)
def test_what_the_agent_refuses_is_refused_first(play: Play, settings: str, words: str) -> None:
    start = ("--start-at-task", "Ask the agent's own code whether it can work with the settings")
    run = play(COMMAND, *start, "--check", "-e", f"{{{settings}}}", inventory=PAIR)
    refused = "The names are those in agent.yml" in run.words
    assert (refused, words in run.words) == (bool(words), True), run.output


@pytest.mark.parametrize("own", ["mail", "{{ inventory_hostname }}"])
def test_two_nodes_of_one_name(play: Play, own: str) -> None:
    role = ROOT / "roles" / "replication_agent"
    found = yaml.safe_load((role / "tasks" / "preflight.yml").read_text())
    judge = next(
        task for task in found if task["name"].startswith("Refuse two nodes with one name")
    )
    names = {
        "name": "Names",
        "hosts": "umbra_nodes",
        "connection": "local",
        "gather_facts": False,
        "vars_files": [str(role / folder / "main.yml") for folder in ("defaults", "vars")],
        "tasks": [{"ansible.builtin.set_fact": {"hostname": own, "cacheable": True}}, judge],
    }
    run = play(yaml.safe_dump([names]), inventory=PAIR)
    assert ("mail-a and mail-b both call themselves mail" in run.words) is (own == "mail")
    assert (run.code != 0) is (own == "mail"), run.output


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
