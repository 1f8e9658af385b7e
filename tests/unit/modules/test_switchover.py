"""The module switchover: its decisions, with an agent that is played."""

from typing import Any

import pytest
from ansible_collections.umbra.mail.plugins.module_utils._agent import (
    AgentError,
    AgentRefused,
    AgentUnavailable,
)
from ansible_collections.umbra.mail.plugins.modules import switchover as module

MOVED = {
    "changed": True,
    "from": "mail-a",
    "to": "mail-b",
    "epoch": 8,
    "outage_s": 0.5,
    "steps": [{"name": "close ports", "seconds": 0.01}],
}


def status(primary: str | None = "mail-a", **other: Any) -> dict[str, Any]:
    nodes = [{"node": "mail-a"}, {"node": "mail-b"}]
    return {"group": "mail", "primary": primary, "epoch": 7, "nodes": nodes, **other}


class Agent:
    """Plays the agent: answers from lists; an exception among the answers is raised."""

    def __init__(self, statuses: list[Any], answer: Any = MOVED) -> None:
        self.statuses = statuses
        self.answer = answer
        self.asked: list[tuple[str, float, bool]] = []

    def status(self) -> dict[str, Any]:
        return self._give(self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0])

    def switchover(self, to: str, timeout_s: float, dry_run: bool = False) -> dict[str, Any]:
        self.asked.append((to, timeout_s, dry_run))
        return self._give(self.answer)

    @staticmethod
    def _give(answer: Any) -> dict[str, Any]:
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


class Clock:
    """A clock that only sleeping moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def switch(agent: Agent, to: str = "mail-b", check: bool = False) -> dict[str, Any]:
    clock = Clock()
    result: dict[str, Any] = module.switch(agent, to, 10.0, check, clock, clock.sleep)
    return result


def test_moves() -> None:
    agent = Agent([status()])
    result = switch(agent)
    assert agent.asked == [("mail-b", 10.0, False)]
    assert result["changed"] is True
    assert result["msg"] == "The primary moved from mail-a to mail-b in 0.50 s."
    assert result["epoch"] == 8
    assert result["steps"] == MOVED["steps"]


def test_primary_already_asks_nothing_of_the_agent() -> None:
    agent = Agent([status("mail-b")])
    result = switch(agent)
    assert agent.asked == []
    assert (result["changed"], result["from"], result["to"]) == (False, "mail-b", "mail-b")
    assert result["diff"]["before"] == result["diff"]["after"]


def test_check_mode_is_a_dry_run() -> None:
    agent = Agent([status()], {**MOVED, "outage_s": None})
    result = switch(agent, check=True)
    assert agent.asked == [("mail-b", 10.0, True)]
    assert result["changed"] is True
    assert result["msg"] == "The primary would move from mail-a to mail-b."


def test_diff_shows_the_primary() -> None:
    diff = switch(Agent([status()]))["diff"]
    assert diff == {"before": "primary: mail-a\n", "after": "primary: mail-b\n"}


def test_group_without_a_primary() -> None:
    result = switch(Agent([status(None)], {**MOVED, "from": None}))
    assert result["diff"]["before"] == "primary: none\n"


def test_unknown_node_names_the_nodes() -> None:
    agent = Agent([status()])
    with pytest.raises(AgentError, match=r"mail-c is not a node of the group mail.*mail-a, mail-b"):
        switch(agent, "mail-c")
    assert agent.asked == []


@pytest.mark.parametrize("check", [False, True])
def test_refusal_is_passed_on(check: bool) -> None:
    with pytest.raises(AgentRefused, match=r"^not protected$"):
        switch(Agent([status()], AgentRefused("not protected")), check=check)


def test_another_was_faster() -> None:
    result = switch(Agent([status()], {**MOVED, "changed": False}))
    assert result["changed"] is False
    assert result["msg"] == "mail-b is the primary already."


def test_answer_lost_and_move_done() -> None:
    done = status("mail-b", epoch=8, last_switchover={"to": "mail-b", "outage_s": 0.7})
    result = switch(Agent([status(), AgentUnavailable("restart"), done], AgentUnavailable("lost")))
    assert (result["changed"], result["epoch"], result["outage_s"]) == (True, 8, 0.7)


def test_answer_lost_and_an_older_moves_outage_is_not_taken() -> None:
    done = status("mail-b", last_switchover={"to": "mail-a", "outage_s": 0.7})
    assert switch(Agent([status(), done], AgentUnavailable("lost")))["outage_s"] is None


def test_answer_lost_and_move_not_done_ends_at_the_deadline() -> None:
    clock = Clock()
    agent = Agent([status()], AgentUnavailable("lost"))
    with pytest.raises(AgentUnavailable, match="no answer about the move to mail-b"):
        module.switch(agent, "mail-b", 10.0, False, clock, clock.sleep)
    assert 10.0 <= clock.now <= 11.0
    assert len(agent.asked) == 1, "never asked for twice"


def test_answer_lost_in_check_mode_waits_for_nothing() -> None:
    clock = Clock()
    with pytest.raises(AgentUnavailable):
        module.switch(
            Agent([status()], AgentUnavailable("lost")), "mail-b", 10.0, True, clock, clock.sleep
        )
    assert clock.now == 0.0


def test_agent_down() -> None:
    with pytest.raises(AgentUnavailable, match="does not run"):
        switch(Agent([AgentUnavailable("the agent does not run on mail-a")]))
