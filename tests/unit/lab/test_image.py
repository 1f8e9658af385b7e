from tests.lab.umbra_lab import image


def test_package_names_ignore_comments_order_and_repetition() -> None:
    text = "# heading\nb  # why\n\n a\nb\n"
    assert image.package_names(text) == ["a", "b"]


def test_the_name_changes_with_every_ingredient_and_with_nothing_else() -> None:
    def name(
        base: str = "a b", cached: str = "c d", hook: str = "h", architecture: str = "x86_64"
    ) -> str:
        return image.image_name(base.split(), cached.split(), hook, architecture)

    assert name() == name(base="b a", cached="d c")
    others = [
        name(base="a"),
        name(cached="c"),
        name(hook="h2"),
        name(architecture="aarch64"),
        name(base="a b c", cached="d"),  # the same words, elsewhere
    ]
    assert len({name(), *others}) == len(others) + 1


def test_the_lists_of_this_tree_can_be_read() -> None:
    assert image.current_name().startswith("trixie-")
