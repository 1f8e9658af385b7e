from pathlib import Path

import pytest
from tests.lab.umbra_lab import image, plan
from tests.lab.umbra_lab.shell import LabError


def test_package_names_ignore_comments_order_and_repetition() -> None:
    text = "# heading\nb  # why\n\n a\nb\n"
    assert image.package_names(text) == ["a", "b"]


def test_the_name_changes_with_every_ingredient_and_with_nothing_else() -> None:
    def name(
        release: str = "trixie",
        base: str = "a b",
        cached: str = "c d",
        hook: str = "h",
        architecture: str = "x86_64",
    ) -> str:
        return image.image_name(release, base.split(), cached.split(), hook, architecture)

    assert name() == name(base="b a", cached="d c")
    others = [
        name(release="bookworm"),
        name(base="a"),
        name(cached="c"),
        name(hook="h2"),
        name(architecture="aarch64"),
        name(base="a b c", cached="d"),  # the same words, elsewhere
    ]
    assert len({name(), *others}) == len(others) + 1


@pytest.mark.parametrize("release", image.PACKAGES)
def test_the_lists_of_this_tree_can_be_read(release: str) -> None:
    assert image.current_name(release).startswith(f"{release}-")


def test_every_host_has_an_image() -> None:
    assert {member.release for member in plan.ALL_HOSTS} == set(image.PACKAGES)


@pytest.fixture
def labs(tmp_path: Path) -> Path:
    """Where labs keep their state."""
    return tmp_path / "labs"


@pytest.fixture
def cache(labs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which building an image is making its directory; labs live beside it."""
    cache = labs.with_name("cache")
    monkeypatch.setenv("UMBRA_LAB_CACHE", str(cache))
    monkeypatch.setattr(image, "STATE_ROOT", labs)
    monkeypatch.setattr(image, "_build", lambda release, name: (cache / name).mkdir())
    return cache


def directories(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


def test_only_the_images_that_are_asked_for_are_built(cache: Path) -> None:
    names = image.ensure(["trixie"])
    assert directories(cache) == {names["trixie"]}
    both = image.ensure(["bookworm", "trixie"])
    assert directories(cache) == set(both.values())
    assert both["trixie"] == names["trixie"]
    # A lab without the other release leaves that release's image for the next one.
    image.ensure(["trixie"])
    assert directories(cache) == set(both.values())


def test_an_outdated_image_goes_when_no_host_uses_it(cache: Path, labs: Path) -> None:
    host = labs / "one" / "hosts" / "mail-a"
    host.mkdir(parents=True)
    (host / "image").write_text("trixie-old\n")
    for name in ("trixie-old", "bookworm-old"):
        (cache / name).mkdir(parents=True)
    image.ensure(["trixie"])
    assert directories(cache) == {"trixie-old", image.current_name("trixie")}


def test_a_used_image_is_not_built_anew(cache: Path, labs: Path) -> None:
    names = image.ensure(["trixie", "bookworm"])
    lab = labs / "one"
    lab.mkdir(parents=True)
    (lab / "image").write_text("".join(f"{name}\n" for name in names.values()))
    with pytest.raises(LabError, match="A lab uses"):
        image.ensure(["bookworm"], rebuild=True)
