"""What makes a host a voter of a cluster that runs already."""

import json
from pathlib import Path

import pytest
from roles.coordinator.files.umbra_voter import join as program
from roles.coordinator.files.umbra_voter.join import JoinError, Member, Plan, decide, joining, parse

VOTERS = {
    "a": "https://10.86.0.1:2380",
    "b": "https://10.86.0.2:2380",
    "w": "https://10.86.0.3:2380",
}
A = Member("1", "a", VOTERS["a"], learner=False)
B = Member("2", "b", VOTERS["b"], learner=False)
W = Member("3", "w", VOTERS["w"], learner=False)
OLD = Member("4", "old", "https://10.86.0.9:2380", learner=False)


@pytest.mark.parametrize(
    ("members", "has_data", "plan"),
    [
        ([A, B, W], True, Plan()),
        ([A, B, W], False, Plan((W,), add=True, start=True, promote=True)),
        ([A, B], False, Plan(add=True, start=True, promote=True)),
        ([A, B, OLD], False, Plan((OLD,), add=True, start=True, promote=True)),
        # It died when it was added, when it had started, and before it had its vote.
        ([A, B, Member("5", "", VOTERS["w"], True)], False, Plan(start=True, promote=True)),
        ([A, B, Member("5", "", VOTERS["w"], True)], True, Plan(promote=True)),
        ([A, B, Member("5", "w", VOTERS["w"], True)], True, Plan(promote=True)),
        # The data were lost again before it had its vote.
        (
            [A, B, Member("5", "w", VOTERS["w"], True)],
            False,
            Plan((Member("5", "w", VOTERS["w"], True),), add=True, start=True, promote=True),
        ),
    ],
)
def test_each_step_follows_from_what_is_there(
    members: list[Member], has_data: bool, plan: Plan
) -> None:
    assert decide(members, VOTERS, "w", has_data) == plan


def test_who_died_after_the_vote_is_tidied_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"ID": number, "name": name, "peerURLs": [url]}
        for number, (name, url) in enumerate(VOTERS.items(), 1)
    ]
    called = []

    def run(*argv: str) -> str:
        called.append(argv[:2])
        return json.dumps({"members": rows})

    monkeypatch.setattr(program, "run", run)
    monkeypatch.setattr(program, "DROP_IN", tmp_path / "join.conf")
    (tmp_path / "member" / "wal").mkdir(parents=True)
    (tmp_path / "member" / "wal" / "0.wal").touch()
    for name in ("join.conf", "join.yml"):
        (tmp_path / name).touch()
    assert program.join(VOTERS, "w", "others", tmp_path, tmp_path, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["member"]
    assert called[-1] == ("systemctl", "daemon-reload")
    assert not program.join(VOTERS, "w", "others", tmp_path, tmp_path, 1.0)


def test_one_member_is_replaced_at_a_time() -> None:
    with pytest.raises(JoinError, match="old and w would both be taken off"):
        decide([A, OLD, W], VOTERS, "w", has_data=False)


def test_data_of_a_member_that_was_taken_off_are_not_used() -> None:
    with pytest.raises(JoinError, match="data of another member"):
        decide([A, B], VOTERS, "w", has_data=True)


def test_the_first_start_has_the_list_of_the_cluster() -> None:
    config = (
        'name: "w"\ninitial-cluster: "a=x,b=y"\ninitial-cluster-token: "mail"\n'
        "initial-cluster-state: new\nlog-level: warn\n"
    )
    members = [A, B, Member("5", "", VOTERS["w"], True)]
    assert joining(config, members, "w", VOTERS["w"]) == (
        'name: "w"\n'
        f'initial-cluster: "a={VOTERS["a"]},b={VOTERS["b"]},w={VOTERS["w"]}"\n'
        'initial-cluster-token: "mail"\ninitial-cluster-state: existing\nlog-level: warn\n'
    )


def test_the_list_is_read_as_etcdctl_prints_it() -> None:
    text = json.dumps(
        {
            "header": {"cluster_id": 14659823159246718735},
            "members": [
                {"ID": 10429710872082166445, "name": "a", "peerURLs": [VOTERS["a"]],
                 "clientURLs": ["https://10.86.0.1:2379"]},
                {"ID": 541888, "name": "", "peerURLs": [VOTERS["w"]], "isLearner": True},
            ],
        }
    )  # fmt: skip
    assert parse(text) == [
        Member("90bdc6c7787cb2ad", "a", VOTERS["a"], learner=False),
        Member("844c0", "", VOTERS["w"], learner=True),
    ]
    with pytest.raises(JoinError, match="makes no sense"):
        parse("{}")
