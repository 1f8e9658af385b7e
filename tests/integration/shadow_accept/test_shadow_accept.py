"""With the shadow off and the policy `accept`: mail is taken, and never silently."""

from __future__ import annotations

from functools import partial

import pytest
from tests.integration import lab

USER = "user08@example.org"


@pytest.fixture(scope="module", autouse=True)
def accepts(primary: str) -> None:
    """The agent was restarted without its peer: it was alone, so it opens by itself."""
    policy = lab.run(primary, "grep shadow_policy /etc/umbra/agent.yml")
    assert policy.split() == ["shadow_policy:", "accept"]


def test_mail_is_taken_and_delivered(primary: str) -> None:
    for _ in range(5):
        mail = lab.mail()
        code, answer = lab.send(primary, [USER, "user01@example.net"], mail.content)
        assert code == 250, answer
        for user in (USER, "user01@example.net"):
            delivered = partial(lab.copies, primary, user, mail.id)
            assert len(lab.wait("the mail is delivered", delivered)) == 1


def test_degraded_and_why(primary: str) -> None:
    def reasons() -> list[str]:
        return [reason for reason in lab.status(primary)["reasons"] if "mail-b" in reason]

    assert lab.wait("the reason names the node that is missing", reasons, 10)
    assert lab.status(primary)["protected"] is False
    assert lab.host(primary).run("umbractl health").rc == 1
