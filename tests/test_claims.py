"""The claims of tests/claimed.py: the rule of their verdicts, resuming, the page and its JSON."""

import argparse
import json
import os

import claimed
import claims
import orderings
import pytest
from claimed import CLAIMS, PAPERS, Claim
from claims import NotRun, Store, page, verdict

import phased_dmd
from models.files import UserError
from models.plumbing.run import run_main


@pytest.mark.parametrize(
    "pairs, want",
    [
        ([], "not run"),
        ([(1, 2), (3, 4)], "reproduced"),
        ([(2, 1), (4, 3)], "not reproduced"),
        ([(1, 2), (4, 3)], "unclear"),  # seeds disagree
        ([(1, 2), (3.9, 4)], "unclear"),  # one within the margin
        ([(2, 1), (4, 3.9)], "unclear"),
        ([(1, 1.05)], "reproduced"),
        ([(0, 0)], "reproduced"),  # an error of nothing
        ([(0, -0.2)], "not reproduced"),  # a share that ought to be positive
        ([(float("nan"), 1)], "unclear"),
        ([(1, float("inf"))], "reproduced"),
    ],
)
def test_verdict_is_of_the_numbers(pairs, want):
    assert verdict(pairs) == want


def test_finished_measurements_are_not_repeated(tmp_path):
    """One that was killed leaves nothing and is made again; the others are read."""
    calls, store = [], Store(str(tmp_path))

    def measure():
        calls.append(1)
        return {"fd": 2.5}

    def killed():
        raise KeyboardInterrupt

    assert store.get("a", measure) == {"fd": 2.5}
    with pytest.raises(KeyboardInterrupt):
        store.get("b", killed)
    again = Store(str(tmp_path), measuring=False)
    assert again.get("a", killed) == {"fd": 2.5} and calls == [1]
    assert again.seconds == store.seconds != {}
    with pytest.raises(NotRun):
        again.get("b", measure)


def example(name, quick=True):
    """A claim whose numbers are 1 and 2 plus the seed, and that counts how often it is measured."""
    calls = []

    def measure(store, seeds):
        def of(seed):
            return store.get(f"{name}-{seed}", lambda: calls.append(seed) or {"x": 2.0 + seed})

        return [(1.0, of(seed)["x"]) for seed in seeds]

    return Claim(name, "dmd", "Tab. 1", "a | b", "c", "d", measure, "e", quick), calls


def test_the_command_goes_on_and_keeps_what_it_was_not_asked_for(tmp_path, monkeypatch):
    """Quick, all, one paper, and without the store: what is known never becomes "not run".

    But it does where it would be measured otherwise now, as with another seed.
    """
    monkeypatch.chdir(tmp_path)
    (quick, quick_calls), (long, long_calls) = example("quick"), example("long", False)
    files = [str(tmp_path / "claims.md"), str(tmp_path / "claims.json")]

    def verdicts(*flags):
        claims.main(list(flags), files, [quick, long])
        table = json.loads(open(files[1]).read())
        assert open(files[0]).read() == page(table)
        return [row["verdict"] for row in table["claims"]]

    assert verdicts("--quick") == ["reproduced", "not run"] and long_calls == []
    assert verdicts("--quick", "--paper", "tdm") == ["reproduced", "not run"]
    assert verdicts() == ["reproduced"] * 2
    assert verdicts("--quick") == ["reproduced"] * 2  # from the store
    assert verdicts("--write", "--output_dir", "elsewhere") == ["reproduced"] * 2  # from the page
    assert quick_calls == long_calls == [0, 1, 2]
    assert verdicts("--write", "--output_dir", "elsewhere", "--seeds", "3") == ["not run"] * 2


def test_unknown_paper_is_one_line(capsys):
    with pytest.raises(UserError):
        claims.main(["--paper", "sora"])
    with pytest.raises(SystemExit) as end:
        run_main(lambda: claims.main(["--paper", "sora"]))
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1
    assert "--paper sora is none of dmd, phased_dmd" in said


def test_every_claim_says_where_it_is_from_and_what_would_refute_it():
    assert len(CLAIMS) >= 40 and sum(claim.quick for claim in CLAIMS) >= 40
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        words = claim.source, claim.says, claim.refuted, claim.numbers, claim.equal
        assert all(len(text) > 4 for text in words), claim.id
        assert any(c in claim.source for c in ("Sec", "Tab", "Fig", "Eq", "Alg", "Theorem", "App",
                                               "released", "abstract")), claim.id  # fmt: skip
        assert claim.says.endswith(".") and (not claim.why or claim.why.endswith(".")), claim.id
        assert "<" in claim.numbers, claim.id
    for paper in PAPERS:
        assert sum(claim.paper == paper for claim in CLAIMS) >= 8, paper


def test_runs_that_claims_compare_exist(tmp_path):
    """Each asks tests/orderings.py for methods it has, on a world whose flags are known."""
    asked = []

    class Asking(Store):
        def get(self, key, measure):
            asked.append(key)
            raise NotRun(key)

    for claim in CLAIMS:
        with pytest.raises(NotRun):
            claim.measure(Asking(str(tmp_path)), [0])
    for key in asked:
        paper, world, *rest = key.split("-")
        if (paper, world) in claimed.SETTINGS:
            method = "-".join(rest).rsplit("-0-max", 1)[0]
            assert method in orderings.METHODS[paper], key
    assert len({key.split("-")[1] for key in asked} & {"glyphs", "clips", "voxels"}) == 3


def test_page_and_table_are_of_these_claims():
    """Both are in the repository; texts that were changed are written by --write."""
    table = json.loads(open(claims.FILES[1]).read())
    assert open(claims.FILES[0]).read() == page(table), "python -m tests.claims --write"
    assert table["papers"] == PAPERS and table["margin"] == claims.MARGIN
    assert len(table["claims"]) == len(CLAIMS)
    for row, claim in zip(table["claims"], CLAIMS):
        for name in ("id", "paper", "source", "says", "refuted", "numbers", "equal", "why"):
            assert row[name] == getattr(claim, name), "python -m tests.claims --write"
        assert row["verdict"] == verdict(row["pairs"])
        of_seeds = row["from"] and not row["from"][0].startswith("form-")
        assert not of_seeds or len(row["pairs"]) == len(table["seeds"]), claim.id
    assert sum(bool(row["pairs"]) for row in table["claims"]) >= 40


def test_writing_anew_loses_no_measurement(tmp_path):
    """Without its store too: a changed setting must not leave rows that no key leads to."""
    copies = [str(tmp_path / f"claims.{end}") for end in ("md", "json")]
    for copy, path in zip(copies, claims.FILES):
        open(copy, "w").write(open(path).read())
    claims.main(["--write", "--output_dir", str(tmp_path / "none")], files=copies)
    for copy, path in zip(copies, claims.FILES):
        assert open(copy).read() == open(path).read()


def test_a_broken_loss_turns_its_verdicts(tmp_path, monkeypatch):
    """The fake's target of Phased DMD, right and replaced by the naive one."""

    def verdicts(folder):
        store = Store(str(tmp_path / folder))
        of = {claim.id: claim for claim in CLAIMS}
        names = "phased-target", "phased-rest"
        return [verdict(of[name].measure(store, [0])) for name in names]

    assert verdicts("right") == ["reproduced"] * 2
    monkeypatch.setattr(phased_dmd, "subinterval_target", phased_dmd.naive_target)
    assert verdicts("wrong")[0] == "not reproduced" and verdicts("wrong")[1] != "reproduced"


def test_a_run_is_stored_with_what_its_log_says(tmp_path, monkeypatch):
    """A folder without report.json, which a killed run left, makes way first."""
    seen = []

    def measured(args, method, given, seed):
        folder = orderings.folder_of(args, method, given, seed)
        seen.append((method, seed, os.path.exists(folder)))
        os.makedirs(folder)
        with open(os.path.join(folder, "log.csv"), "w") as f:
            f.write("step,mean,cos_dm_ca\n1,9,.4\n2,9,.2\n3,1,-.1\n4,3,-.3\n")
        return {"fd": 1.5, "hit": 0.9}, 1.0, []

    monkeypatch.setattr(orderings, "measured", measured)
    store, at = Store(str(tmp_path)), ("decoupled_dmd", "ring", "observer", 1)
    given = [*claimed.SETTINGS["decoupled_dmd", "ring"].split(), "--preview_every", "0"]
    args = argparse.Namespace(
        script="decoupled_dmd", world="ring", output_dir=str(tmp_path / "runs")
    )
    os.makedirs(os.path.join(orderings.folder_of(args, "observer", given, 1), "state"))
    numbers = claimed.trained(store, *at)
    assert numbers == {"fd": 1.5, "hit": 0.9, "wobble": 1.0, "cos": -0.3, "cos(1/4)": 0.4}
    assert claimed.trained(store, *at) == numbers and seen == [("observer", 1, False)]
    assert claimed.value(numbers, "1 - hit") == pytest.approx(0.1)
    assert claimed.value(numbers, "1 + cos") == 0.7 and claimed.value(numbers, "-fd") == -1.5


@pytest.mark.long
def test_a_claim_on_glyphs_runs_at_tiny_length(tmp_path, monkeypatch):
    """Two updates each: numbers and a verdict, whatever it is, and nothing is trained twice."""
    monkeypatch.setitem(claimed.SETTINGS, ("dmd", "glyphs"), "--max_train_steps 2")
    claim = next(claim for claim in CLAIMS if claim.id == "dmd-one-step-glyphs")
    store = Store(str(tmp_path))
    pairs = claim.measure(store, [0])
    assert len(pairs) == 1 and verdict(pairs) in claims.KINDS[:3]
    store.measuring = False
    assert claim.measure(store, [0]) == pairs
