"""The repository keeps every rule, and every rule finds what breaks it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.gates import rules

Rule = Callable[[Path], rules.Findings]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_repository(rule: Rule) -> None:
    findings = rule(rules.ROOT)
    assert not findings, "\n" + "\n".join(findings)


README = "roles/x/README.md"
DEFAULTS = "roles/x/defaults/main.yml"
META = "roles/x/meta/main.yml"
SPECS = "roles/x/meta/argument_specs.yml"
TASKS = "roles/x/tasks/main.yml"
SERVICE = "roles/x/tasks/service.yml"
PLAYBOOK = "playbooks/site.yml"
BASE = "extensions/molecule/config.yml"
SCENARIO = "extensions/molecule/pair/molecule.yml"
MOVE = "extensions/molecule/pair/move.yml"
TEST = "extensions/molecule/pair/tests/test_pair.py"
TARBALL = "build/collections/ansible_collections/umbra/mail/"

GOOD = {
    README: """\
# x
## Requirements
## Variables
### `x_a`
### `x_b`
### `x_n`
## Example
## Tags
""",
    DEFAULTS: """\
# What a is for.
x_a: one
# What n is for.
x_n: 1
""",
    META: "galaxy_info: {}",
    SPECS: """\
argument_specs:
  main:
    options:
      x_a: {type: str, default: one}
      x_b: {type: str}
      x_n: {type: int, default: 1}
""",
    TASKS: """\
- name: Say
  ansible.builtin.debug:
    msg: "{{ ansible_facts['os_family'] }} {{ x_n }} {{ x_n | int + 1 }}"
  register: __x_said
- name: Block
  block:
    - name: Set
      ansible.builtin.set_fact:
        __x_fact: 1
      delegate_to: localhost
      vars: {ansible_become: false}
""",
    SERVICE: """\
- name: Install
  ansible.builtin.apt: {name: x}
  when: not ansible_check_mode
- name: Start
  ansible.builtin.systemd_service:
    daemon_reload: "{{ __x_said | default({}) is changed }}"
""",
    PLAYBOOK: """\
- name: Play
  hosts: all
  vars: {ansible_become: false}
  tasks: []
""",
    BASE: """\
verifier: {name: testinfra, directory: tests}
scenario:
  test_sequence: [converge, verify, side_effect, verify]
""",
    SCENARIO: "ansible: {playbooks: {side_effect: move.yml}}",
    MOVE: """\
- name: Move
  hosts: all
  tasks: []
""",
    TEST: "def test_pair(): ...",
    "docs/x.md": """\
# X
## A `b`, and c: d_e
[here](#a-b-and-c-d_e), [there](../roles/x/README.md#x_a) and [away](https://mail.example/x#y)
```
[code](nowhere.md)
```
""",
    "requirements.in": "Ruff>=0.1",
    "requirements.txt": "ruff==0.17.6\nuvloop==0.21.0 ; sys_platform == 'linux'",
    TARBALL + "MANIFEST.json": "",
    TARBALL + "LICENSE": "",
    TARBALL + "README.md": "",
    TARBALL + "CHANGELOG.md": "",
    TARBALL + "meta/runtime.yml": "",
    TARBALL + "roles/x/README.md": "",
    TARBALL + "playbooks/site.yml": "",
}

GONE = None
# For each rule: file, what is replaced in it, by what (GONE: file removed), part of the finding.
BAD: dict[Rule, list[tuple[str, str, str | None, str]]] = {
    rules.role_has_its_rooms: [(META, "", GONE, "meta/main.yml is missing")],
    rules.specs_equal_defaults: [
        (DEFAULTS, "x_a: one", "x_a: two", "x_a has two defaults"),
        (DEFAULTS, "x_a: one", "x_c: 1\nx_a: one", "x_c is in defaults"),
        (DEFAULTS, "x_n: 1", "", "x_n has a default in argument_specs only"),
        (DEFAULTS, "x_n: 1", "x_n: '1'", "default of x_n is no int"),
        (DEFAULTS, "x_n: 1", "x_n: true", "default of x_n is no int"),
        (SPECS, "default: one", "required: true", "x_a is required and has a default"),
    ],
    rules.variables_are_namespaced: [
        (DEFAULTS, "x_a: one", "a: one", "a does not begin with x_"),
        (TASKS, "__x_said", "said", "said in main.yml does not begin"),
        (TASKS, "__x_fact", "fact", "fact in main.yml does not begin"),
    ],
    rules.defaults_are_commented: [(DEFAULTS, "# What n is for.\n", "", "no comment above x_n")],
    rules.readme_has_each_variable: [
        (README, "### `x_a`\n", "", "no heading for x_a"),
        (README, "### `x_a`", "### `x_a`\n### `x_z`", "speaks of x_z"),
        (README, "## Tags", "", "no heading Tags"),
    ],
    rules.tasks_are_in_order: [
        (TASKS, "- name: Say", "- name: Say\n  ignore_errors: true", "Say has ignore_errors"),
        (TASKS, "ansible.builtin.debug", "debug", "short name debug"),
        (TASKS, "ansible.builtin.set_fact", "set_fact", "short name set_fact"),
        (TASKS, "ansible.builtin.debug", "ansible.builtin.include_tasks", "without a loop"),
    ],
    rules.typed_values_are_cast: [
        (TASKS, "x_n | int + 1", "x_n + 1", "x_n is not cast"),
        (TASKS, "register: __x_said", "when: x_n > 1", "x_n is not cast"),
        (TASKS, "name: Block", "name: Block\n  when: not x_n", "x_n is not cast"),
        (TASKS, "register: __x_said", "when: [x_a == 'x_n', x_n | int > 1, x_n]", "x_n is not"),
    ],
    rules.controller_needs_no_root: [
        (TASKS, "vars: {ansible_become: false}", "become: false", "Set lacks ansible_become"),
        (TASKS, "ansible_become: false", "ansible_become: true", "Set lacks ansible_become"),
        (TASKS, "delegate_to: localhost", "local_action: {}", "Set has local_action"),
        (
            PLAYBOOK,
            "hosts: all\n  vars: {ansible_become: false}",
            "hosts: localhost",
            "Play lacks ansible_become",
        ),
    ],
    rules.packages_can_be_rehearsed: [
        (SERVICE, "  when: not ansible_check_mode\n", "", "Install fails in check mode"),
    ],
    rules.tags_leave_nothing_undefined: [
        (SERVICE, " | default({})", "", "__x_said of main.yml has no default"),
    ],
    rules.plays_have_names: [(PLAYBOOK, "name: Play\n  ", "", "play 1 has no name")],
    rules.facts_are_not_injected: [
        (TASKS, "ansible_facts['os_family']", "ansible_os_family", "ansible_os_family is an"),
    ],
    rules.scenarios_test_something: [
        (TEST, "", GONE, "verify finds no test"),
        (TEST, "test_pair", "pair", "verify finds no test"),
        (BASE, "directory: tests", "directory: tests/test_pair.py", "verify finds no test"),
        (BASE, "testinfra", "ansible", "not testinfra"),
        (BASE, "verify", "cleanup", "never verifies"),
        (MOVE, "", GONE, "no playbook move.yml"),
        (SCENARIO, "side_effect: move.yml", "", "no playbook side_effect.yml"),
        (SCENARIO, "", GONE, "no molecule scenario"),
    ],
    rules.nothing_forbidden: [
        (PLAYBOOK, "Play", "See https://" + "py" + "pi.org/x", "registry"),
        (PLAYBOOK, "Play", "In /wo" + "rk/main", "one machine"),
        (PLAYBOOK, "Play", "Made in a previous ses" + "sion", "came to be"),
    ],
    rules.links_lead_somewhere: [
        ("docs/x.md", "README.md#x_a", "README.md#x_z", "leads to no heading"),
        ("docs/x.md", "#a-b-and", "#a-b", "leads to no heading"),
        ("docs/x.md", "roles/x", "roles/z", "leads nowhere"),
        ("docs/x.md", "roles/x/README.md#x_a", "extensions", "is not in the tarball"),
    ],
    rules.requirements_are_locked: [
        ("requirements.txt", "ruff==", "ruff>=", "not one exact version"),
        ("requirements.in", "Ruff", "mypy", "lacks mypy"),
    ],
    rules.tarball_holds_only_the_collection: [
        (TARBALL + "LICENSE", "", GONE, "lacks LICENSE"),
        (TARBALL + "tests/x", "", "", "holds tests"),
    ],
}
CASES = [(rule, *case) for rule, cases in BAD.items() for case in cases]


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    for name, text in GOOD.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_good_sample(sample: Path, rule: Rule) -> None:
    assert rule(sample) == []


@pytest.mark.parametrize(("rule", "file", "old", "new", "finding"), CASES)
def test_bad_sample(
    sample: Path, rule: Rule, file: str, old: str, new: str | None, finding: str
) -> None:
    path = sample / file
    if new is GONE:
        path.unlink()
    else:
        text = path.read_text() if path.exists() else ""
        assert old in text
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new))
    assert finding in "\n".join(rule(sample))


def test_every_rule_has_a_bad_sample() -> None:
    assert set(BAD) == set(rules.RULES)
