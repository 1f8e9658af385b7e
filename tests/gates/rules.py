"""The house's rules that no linter knows.

Each rule takes a folder laid out like the repository and returns its findings, one sentence each.
What a linter finds already is not looked for again here.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]

TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "path": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
    "raw": (object,),
}

# Variables that Ansible itself sets under these names; every other ansible_x is an injected fact.
MAGIC = re.compile(
    r"ansible_("
    r"facts|managed|host|port|user|password|connection|check_mode|diff_mode|version|verbosity|forks|limit|config_file"
    r"|python_interpreter|playbook_python|run_tags|skip_tags|loop|loop_var|index_var|search_path|inventory_sources"
    r"|failed_task|failed_result|role_name|role_names|play_role_names|parent_role_names|parent_role_paths"
    r"|dependent_role_names|collection_name|play_name|play_hosts|play_hosts_all|play_batch|local|collections"
    r"|(ssh|become|paramiko|shell|pipelining|timeout|winrm)\w*"
    r")$"
)

# What no tracked file may hold. Written so that this file itself does not match.
FORBIDDEN = {
    "the host of a package registry": r"py[p]i\.org|python[h]osted\.org|registry\.npm[j]s"
    r"|galaxy\.[a]nsible\.com|(deb|ftp\.\w+)\.[d]ebian\.org|proxy\.[g]olang",
    "a path of one machine": r"(?<![\w.$}/-])/wor[k]/|/roo[t]/\.(?!ssh\b|ansible\b)",
    "talk about how the text came to be": r"(?i)\b([c]laude|anthropi[c]|chat[g]pt|open[a]i"
    r"|copilo[t]|language [m]odel|a[i] (tool|assistant|agent)|sub-?[a]gent"
    r"|(this|previous|earlier|next|last|helper) [s]ession)\b",
}

KEYWORDS = frozenset(
    """
    action any_errors_fatal args async become become_exe become_flags become_method become_user
    changed_when check_mode collections connection debugger delay delegate_facts delegate_to diff
    environment failed_when ignore_errors ignore_unreachable listen local_action loop loop_control
    module_defaults name no_log notify poll port register remote_user retries run_once tags throttle
    timeout until vars when
    """.split()  # noqa: SIM905
)

Findings = list[str]


def roles(root: Path) -> list[Path]:
    """The role folders."""
    return sorted(p for p in (root / "roles").glob("*") if p.is_dir())


def load(path: Path) -> Any:
    """A YAML file's content; None if it is empty or missing."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)  # !vault, !unsafe
    return yaml.load(path.read_text(), Loader) if path.exists() else None


def options(role: Path) -> dict[str, dict[str, Any]]:
    """The documented options of a role, of all its entry points."""
    specs = (load(role / "meta" / "argument_specs.yml") or {}).get("argument_specs", {})
    merged: dict[str, dict[str, Any]] = {}
    for entry in specs.values():
        merged.update(entry.get("options") or {})
    return merged


def defaults(role: Path) -> dict[str, Any]:
    """The defaults of a role."""
    return load(role / "defaults" / "main.yml") or {}


def tasks(node: Any) -> Iterator[dict[str, Any]]:
    """All tasks in a parsed task file or playbook; of a block, what is in it."""
    if isinstance(node, list):
        for item in node:
            yield from tasks(item)
    elif isinstance(node, dict):
        lists = ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks", "handlers")
        found = [node[key] for key in lists if key in node]
        for inner in found:
            yield from tasks(inner)
        if not found and "hosts" not in node and "ansible.builtin.import_playbook" not in node:
            yield node


def task_files(root: Path) -> list[Path]:
    """The files that hold tasks."""
    patterns = (
        "roles/*/tasks/**/*.yml",
        "roles/*/handlers/*.yml",
        "playbooks/*.yml",
        "extensions/molecule/*/*.yml",
    )
    found = (path for pattern in patterns for path in root.glob(pattern))
    return sorted(path for path in found if path.name not in ("molecule.yml", "inventory.yml"))


def role_has_its_rooms(root: Path) -> Findings:
    """Every role has the same files."""
    wanted = (
        "README.md",
        "defaults/main.yml",
        "meta/main.yml",
        "meta/argument_specs.yml",
        "tasks/main.yml",
    )
    return [
        f"{role.name}: {file} is missing."
        for role in roles(root)
        for file in wanted
        if not (role / file).exists()
    ]


def specs_equal_defaults(root: Path) -> Findings:
    """Argument specs and defaults name the same variables, values and types."""
    findings = []
    for role in roles(root):
        specs, values = options(role), defaults(role)
        findings += [
            f"{role.name}: {name} is in defaults, not in argument_specs."
            for name in values.keys() - specs.keys()
        ]
        for name, spec in specs.items():
            if name not in values:
                if "default" in spec:
                    findings.append(f"{role.name}: {name} has a default in argument_specs only.")
                continue
            value = values[name]
            if spec.get("required"):
                findings.append(f"{role.name}: {name} is required and has a default.")
            elif spec.get("default") != value:
                findings.append(f"{role.name}: {name} has two defaults.")
            template = isinstance(value, str) and "{{" in value
            kind = spec.get("type", "str")
            if not (template or value is None or isinstance(value, TYPES.get(kind, ()))) or (
                kind in ("int", "float") and isinstance(value, bool)
            ):
                findings.append(f"{role.name}: the default of {name} is no {kind}.")
    return findings


def variables_are_namespaced(root: Path) -> Findings:
    """Options, set_fact and register use the role's name: role_x in public, __role_x inside."""
    findings = []
    for role in roles(root):
        public, own = f"{role.name}_", (f"{role.name}_", f"__{role.name}_")
        for name in options(role).keys() | defaults(role).keys():
            if not name.startswith(public):
                findings.append(f"{role.name}: {name} does not begin with {public}.")
        for path in task_files(role.parent.parent):
            if role not in path.parents:
                continue
            for task in tasks(load(path)):
                names = list(task.get("ansible.builtin.set_fact") or {})
                names += [task["register"]] if "register" in task else []
                findings += [
                    f"{role.name}: {name} in {path.name} does not begin with {own[0]} or {own[1]}."
                    for name in names
                    if name != "cacheable" and not name.startswith(own)
                ]
    return findings


def defaults_are_commented(root: Path) -> Findings:
    """A comment stands above each variable in defaults."""
    findings = []
    for role in roles(root):
        path = role / "defaults" / "main.yml"
        lines = path.read_text().splitlines() if path.exists() else []
        for before, line in zip(["", *lines], lines, strict=False):
            if re.match(r"\w+:", line) and not before.startswith("#"):
                findings.append(f"{role.name}: no comment above {line.split(':')[0]} in defaults.")
    return findings


def readme_has_each_variable(root: Path) -> Findings:
    """A role's README has the common parts and a heading for each variable."""
    findings = []
    for role in roles(root):
        readme = role / "README.md"
        text = readme.read_text() if readme.exists() else ""
        headings = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
        parts = ["Requirements", *(["Variables"] if options(role) else []), "Example", "Tags"]
        findings += [
            f"{role.name}: README has no heading {part}." for part in parts if part not in headings
        ]
        findings += [
            f"{role.name}: README has no heading for {name}."
            for name in options(role)
            if f"`{name}`" not in headings
        ]
        findings += [
            f"{role.name}: README speaks of {name}, which is no variable of the role."
            for name in re.findall(r"^### `(\w+)`", text, re.MULTILINE)
            if name not in options(role)
        ]
    return findings


def tasks_are_in_order(root: Path) -> Findings:
    """No ignore_errors, full module names, static imports."""
    findings = []
    for path in task_files(root):
        where = path.relative_to(root)
        for task in tasks(load(path)):
            label = f"{where}: {task.get('name', 'a task without a name')}"
            if "ignore_errors" in task:
                findings.append(f"{label} has ignore_errors.")
            modules = [key for key in task if key not in KEYWORDS and not key.startswith("with_")]
            findings += [f"{label} uses the short name {m}." for m in modules if m.count(".") < 2]
            if "ansible.builtin.include_tasks" in task and "loop" not in task:
                findings.append(f"{label} includes tasks without a loop, so that tags miss them.")
    return findings


def _expressions(path: Path) -> Iterator[str]:
    """The Jinja expressions of a file of a role: in braces, and a task's bare conditions."""
    text = re.sub(r"(?m)^\s*#.*$", "", path.read_text())
    yield from (found[1] for found in re.finditer(r"\{[{%]-?(.*?)-?[%}]\}", text, re.DOTALL))
    if path.parent.name in ("tasks", "handlers"):
        yield from _conditions(load(path))


def _conditions(node: Any) -> Iterator[str]:
    """The bare conditions below a parsed task file, those of blocks too."""
    if isinstance(node, list):
        for item in node:
            yield from _conditions(item)
    elif isinstance(node, dict):
        for key in ("when", "until", "changed_when", "failed_when", "that"):
            found = node.get(key)
            yield from (f"({one})" for one in (found if isinstance(found, list) else [found]))
        for value in node.values():
            yield from _conditions(value)


def typed_values_are_cast(root: Path) -> Findings:
    """A number or boolean is cast where it is reckoned with: `-e` and INI files give strings.

    Without that, "false" is true and "5" * 2 is "55".
    """
    findings = []
    for role in roles(root):
        kinds = {name: spec.get("type") for name, spec in options(role).items()}
        typed = [name for name, kind in kinds.items() if kind in ("int", "float", "bool")]
        if not typed:
            continue
        uncast = re.compile(
            rf"(?<!\w)({'|'.join(typed)})(?!\w)(?!\s*\|\s*(int|float|bool|string)\b)"
        )
        for folder in ("tasks", "handlers", "templates", "vars", "defaults"):
            for path in sorted(p for p in (role / folder).glob("**/*") if p.is_file()):
                for expression in _expressions(path):
                    words = re.sub(r"'[^']*'", "''", expression)
                    found = uncast.search(words)
                    # Alone in its braces it is only written out.
                    if found and words.strip() != found[1]:
                        findings.append(f"{path.relative_to(root)}: {found[1]} is not cast.")
    return findings


def controller_needs_no_root(root: Path) -> Findings:
    """What runs on the controller says so in a variable that it is not to be root.

    The keyword become is not enough: an inventory's ansible_become outranks it.
    """
    findings = []
    for path in task_files(root):
        if path.is_relative_to(root / "extensions"):
            continue  # the lab's own
        content = load(path) or []
        here = [play for play in content if play.get("hosts") == "localhost"]
        here += [task for task in tasks(content) if task.get("delegate_to") == "localhost"]
        findings += [
            f"{path.relative_to(root)}: {item.get('name')} lacks ansible_become: false."
            for item in here
            if (item.get("vars") or {}).get("ansible_become") is not False
        ]
        findings += [
            f"{path.relative_to(root)}: {task.get('name')} has local_action; use delegate_to."
            for task in tasks(content)
            if "local_action" in task
        ]
    return findings


def packages_can_be_rehearsed(root: Path) -> Findings:
    """A first run with --check passes where apt cannot be asked from Python yet."""
    return [
        f"{path.relative_to(root)}: {task.get('name')} fails in check mode without python3-apt."
        for path in task_files(root)
        for task in tasks(load(path))
        if "ansible.builtin.apt" in task
        and "not ansible_check_mode" not in str(task.get("when"))
        and "check mode" not in str(task.get("failed_when"))
    ]


def tags_leave_nothing_undefined(root: Path) -> Findings:
    """What one room of a role registers, the room service reads with a default.

    Else the room's own tag ends with an undefined variable.
    """
    findings = []
    for path in sorted((root / "roles").glob("*/tasks/service.yml")):
        text = path.read_text()
        own = {task.get("register") for task in tasks(load(path))}
        for other in sorted(set(path.parent.glob("*.yml")) - {path}):
            names = {str(task["register"]) for task in tasks(load(other)) if "register" in task}
            findings += [
                f"{path.relative_to(root)}: {name} of {other.name} has no default."
                for name in sorted(names - own)
                if re.search(rf"\b{name}\b(?! \| default\()", text)
            ]
    return findings


def plays_have_names(root: Path) -> Findings:
    """Every play in a playbook is named."""
    return [
        f"{path.relative_to(root)}: play {number} has no name."
        for path in sorted((root / "playbooks").glob("*.yml"))
        for number, play in enumerate(load(path) or [], start=1)
        if not play.get("name")
    ]


def facts_are_not_injected(root: Path) -> Findings:
    """Facts are read as ansible_facts['x'], not as ansible_x."""
    findings = []
    for folder in ("roles", "playbooks", "inventories"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in (".yml", ".yaml", ".j2") or not path.is_file():
                continue
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                code = re.sub(r"(^|\s)#.*", "", line)
                findings += [
                    f"{path.relative_to(root)}:{number}: {name} is an injected fact."
                    for name in re.findall(r"(?<![\w.'\"/-])ansible_\w+", code)
                    if not MAGIC.match(name)
                ]
    return findings


def scenarios_test_something(root: Path) -> Findings:
    """A molecule scenario's verify finds tests and its side effects have playbooks.

    Molecule itself passes over both with a warning at most.
    """
    molecule = root / "extensions" / "molecule"
    base = load(molecule / "config.yml") or {}
    findings = []
    scenarios = sorted(molecule.glob("*/molecule.yml"))
    if not any(path.parent.name != "default" for path in scenarios):
        findings.append("There is no molecule scenario.")
    for path in scenarios:
        name, config = path.parent.name, load(path) or {}

        def setting(section: str, key: str, config: dict[str, Any] = config) -> Any:
            own = (config.get(section) or {}).get(key)
            return own if own is not None else (base.get(section) or {}).get(key)

        sequence = [step.split() for step in setting("scenario", "test_sequence") or []]
        if name != "default" and ["verify"] not in [step[:1] for step in sequence]:
            findings.append(f"{name}: the scenario never verifies.")
        for action, *arguments in sequence:
            if action == "verify":
                if setting("verifier", "name") != "testinfra":
                    findings.append(f"{name}: the verifier is not testinfra.")
                for folder in arguments or [setting("verifier", "directory") or ""]:
                    tests = sorted((path.parent / folder).glob("**/test_*.py"))
                    if not any("def test_" in test.read_text() for test in tests):
                        findings.append(f"{name}: verify finds no test in folder '{folder}'.")
            elif action == "side_effect":
                playbooks = setting("ansible", "playbooks") or {}
                if not arguments and "side_effect" not in playbooks:
                    playbooks = {"side_effect": "side_effect.yml"}
                for file in arguments or [playbooks["side_effect"]]:
                    if not (path.parent / file).is_file():
                        findings.append(f"{name}: side_effect has no playbook {file}.")
                if not (path.parent / playbooks.get("side_effect", "side_effect.yml")).is_file():
                    findings.append(f"{name}: without playbooks.side_effect the step is skipped.")
    return findings


def tracked(root: Path) -> list[Path]:
    """The files under version control."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    return [root / name for name in names.split("\0") if name and (root / name).is_file()]


def nothing_forbidden(root: Path) -> Findings:
    """No tracked text names a registry's host, a path of one machine, or how it came to be."""
    findings = []
    for path in tracked(root):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # sample mail and other binary data
        for what, pattern in FORBIDDEN.items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                findings.append(f"{path.relative_to(root)}:{line}: {what}: {match[0]}")
    return findings


NOT_DELIVERED = ("CONTRIBUTING.md", "Makefile", "extensions", "tests")


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as they are made where it is shown."""
    headings = re.findall(r"^#+ +(.*?) *$", _without_code(text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def _without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def links_lead_somewhere(root: Path) -> Findings:
    """Links between the pages lead to files and headings that are there, and are delivered too."""
    findings = []
    for page in tracked(root):
        where = page.relative_to(root)
        if page.suffix != ".md" or where.name == "CHANGELOG.md":
            continue
        delivered = where.parts[0] not in NOT_DELIVERED
        for link in re.findall(r"\]\(([^()\s]+)\)", _without_code(page.read_text())):
            name, _, anchor = link.partition("#")
            if ":" in name:
                continue
            target = (page.parent / name).resolve() if name else page
            if not target.exists():
                findings.append(f"{where}: {link} leads nowhere.")
            elif anchor and anchor not in _anchors(target.read_text()):
                findings.append(f"{where}: {link} leads to no heading.")
            elif delivered and target.relative_to(root).parts[:1] in [(x,) for x in NOT_DELIVERED]:
                findings.append(f"{where}: {link} is not in the tarball.")
    return findings


def requirements_are_locked(root: Path) -> Findings:
    """Each requirement is locked to one version, for each Python that it says."""
    lines = (root / "requirements.txt").read_text().splitlines()
    findings = [
        f"requirements.txt: '{line}' is not one exact version."
        for line in lines
        if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*( ; [^;]+)?", line)
    ]
    locked = {line.split("==")[0] for line in lines}
    for line in (root / "requirements.in").read_text().splitlines():
        name = re.split(r"[=<>#]", line)[0].strip().lower()
        if name and name not in locked:
            findings.append(f"requirements.txt lacks {name}: run make lock.")
    return findings


def tarball_holds_only_the_collection(root: Path) -> Findings:
    """The built collection has what an administrator needs and nothing else."""
    installed = root / "build" / "collections" / "ansible_collections" / "umbra" / "mail"
    allowed = {
        "CHANGELOG.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md",
        "changelogs", "docs", "inventories", "meta", "playbooks", "plugins", "roles",
    }  # fmt: skip
    present = {path.name for path in installed.glob("*")}
    needed = {"MANIFEST.json", "LICENSE", "README.md", "CHANGELOG.md", "meta", "roles", "playbooks"}
    return [f"The tarball holds {name}." for name in sorted(present - allowed)] + [
        f"The tarball lacks {name}." for name in sorted(needed - present)
    ]


RULES = (
    role_has_its_rooms,
    specs_equal_defaults,
    variables_are_namespaced,
    defaults_are_commented,
    readme_has_each_variable,
    tasks_are_in_order,
    typed_values_are_cast,
    controller_needs_no_root,
    packages_can_be_rehearsed,
    tags_leave_nothing_undefined,
    plays_have_names,
    facts_are_not_injected,
    scenarios_test_something,
    nothing_forbidden,
    links_lead_somewhere,
    requirements_are_locked,
    tarball_holds_only_the_collection,
)
