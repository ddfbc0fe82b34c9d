"""models/plumbing/report.py and models/pictures.py: samples on all ranks, how often, how large."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from forks import launch
from helpers import ROOT, read_log, save_tiny_teacher
from PIL import Image
from safetensors.torch import load_file, save_file

import decoupled_dmd
import dmd
import linvideo
import mdt_dist
import phased_dmd
import tdm
from models import pictures
from models.diffusion import step_grid
from models.files import load_json
from models.plumbing import report
from models.plumbing.run import Run
from models.worlds.measures import compared

SCRIPTS = [dmd, decoupled_dmd, tdm, phased_dmd, linvideo]
QUICK = "--max_train_steps 2 --train_batch_size 4 --teacher_steps 2 --preview_samples 5"


def command(script, *flags, ranks=1):
    """Run a script as a user does, on gloo ranks.  -> what it printed."""
    done = launch(ROOT / f"{script.__name__}.py", flags, ranks if ranks > 1 else None)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def flags_for(script, tmp_path):
    """Flags of a short run of this script on a small teacher without a world."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    flags = [*QUICK.split(), "--teacher", teacher]
    if script is linvideo:
        bank = "--sampling_steps 4 --bank_size 8 --bank_batch 8 --target_layers 1 --select first"
        return [*flags, *bank.split()]
    if script is tdm:
        return [*flags, "--student_steps", "2"]
    return [*flags, "--student_steps", "2", "--fake_update_ratio", "1"]


# ---- all ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", [dmd, pytest.param(phased_dmd, marks=pytest.mark.long)], ids=lambda s: s.__name__
)
def test_ranks_share_out_the_samples(tmp_path, script):
    """Five samples on two ranks, after training and by --sample: those of one rank."""
    flags = flags_for(script, tmp_path)
    out = tmp_path / "run"
    more = ["--gradient_accumulation_steps", "1", "--checkpointing_steps", "1"]
    command(script, *flags, *more, "--output_dir", out, ranks=2)
    made = load_file(out / "samples.safetensors")["x0"]
    assert len(made) == 5 and (out / "samples.png").is_file() and len(read_log(out)) == 2
    sample = ["--sample", str(out), "--preview_samples", "5", "--output_dir"]
    script.main([*sample, str(tmp_path / "one")])
    assert command(script, *sample, tmp_path / "two", ranks=2).count("samples.png") == 1
    one, two = (load_file(tmp_path / n / "samples.safetensors")["x0"] for n in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one, made, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_ranks_share_out_the_measures(tmp_path):
    """report.json of two ranks, for a world: 2,000 samples a row, half of them on each."""
    flags = "--teacher ring --max_train_steps 1 --teacher_steps 4 --fake_update_ratio 1".split()
    dmd.main([*flags, "--output_dir", str(tmp_path / "1"), "--train_batch_size", "8"])
    command(dmd, *flags, "--output_dir", tmp_path / "2", "--train_batch_size", 4, ranks=2)
    one, two = (load_json(str(tmp_path / n / "report.json"))["results"] for n in ("1", "2"))
    assert [r["name"] for r in one] == [r["name"] for r in two]
    for a, b in zip(one, two):
        for name in a.keys() - {"ms_per_sample", "name"}:
            assert b[name] == pytest.approx(a[name], rel=2e-2, abs=1e-3), (a["name"], name)


@pytest.mark.parametrize("n, ranks, group", [(5, 3, 1), (2, 3, 1), (6, 2, 1), (1, 1, 1), (5, 6, 2)])
def test_shares_are_consecutive_and_gathered_in_order(monkeypatch, n, ranks, group):
    """Every row, the same rows whatever the ranks, by as many calls on each; a rank that has none
    draws one that is not used.

    The ranks of a group (--sequence_ranks) draw the same rows.
    """
    asked, sent = [], {}

    def rank(r):
        run = SimpleNamespace(rank=r, world_size=ranks, main=r == 0, device=torch.device("cpu"))
        run.parts, run.part = ranks // group, r // group
        run.autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=False)

        def gather(part, parts):
            sent[r] = part
            if r == 0:
                for i, p in enumerate(parts):
                    p.copy_(sent[i])

        def draw(first, last):
            asked.append((first, last))
            return torch.arange(first, last, dtype=torch.float32)[:, None].expand(-1, 2)

        monkeypatch.setattr(report.dist, "gather", gather)
        return report.many_on_all_ranks(run, draw, n, (2,), batch=2)[0]

    others = [rank(r) for r in range(1, ranks)]
    x = rank(0)
    assert others == [None] * (ranks - 1)
    assert x[:, 0].tolist() == list(range(n)) and x.shape == (n, 2)
    drawn = [i for a, b in asked for i in range(a, b)]
    assert set(drawn) == set(range(n)) and len(asked) % ranks == 0
    assert n < ranks // group or sorted(drawn) == sorted(list(range(n)) * group)
    assert all(b - a <= 2 for a, b in asked)


@pytest.mark.parametrize("script", [*SCRIPTS, mdt_dist], ids=lambda script: script.__name__)
def test_samples_are_drawn_as_networks_train(monkeypatch, tmp_path, script):
    """Under autocast where training is, in previews, at the end, and by --sample."""
    seen, real = [], report.many

    def watched(draw, n, batch=500):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(draw, n, batch)

    monkeypatch.setattr(report, "many", watched)
    flags = flags_for(script, tmp_path)
    if script is mdt_dist:
        data = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        save_file({"x0": data, "cond.label": torch.arange(6) % 3}, tmp_path / "d.safetensors")
        flags = [*QUICK.split(), *flags[flags.index("--teacher") :][:2]]
        flags += ["--data", str(tmp_path / "d.safetensors"), "--student_steps", "1"]
    out = str(tmp_path / "run")
    flags += ["--checkpointing_steps", "1", "--output_dir", out]
    for precision, on in (("bf16", True), ("no", False)):
        seen.clear()
        script.main([*flags, "--mixed_precision", precision])
        assert len(seen) >= 3 and set(seen) == {on}  # a preview, the student, the teacher
    seen.clear()
    more = ["--data", str(tmp_path / "d.safetensors")] if script is mdt_dist else []
    where = ["--output_dir", str(tmp_path / "samples"), *more]
    script.main(["--sample", out, *where, "--mixed_precision", "bf16"])
    assert seen == [True]


# ---- how often -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "every, expected", [(None, [2, 4, 6]), (0, []), (4, [4]), (3, [4, 6]), (1, [2, 4, 6])]
)
def test_preview_every(monkeypatch, tmp_path, every, expected):
    """Pictures come with saves, here after updates 2, 4, 6 and 7, which is the last."""
    shown, real = [], report.save_samples

    def watched(folder, rows, world):
        shown.extend(int(text.split()[-1]) for text, _ in rows if "step" in text)
        real(folder, rows, world)

    monkeypatch.setattr(report, "save_samples", watched)
    flags = [*flags_for(dmd, tmp_path), "--max_train_steps", "7", "--checkpointing_steps", "2"]
    flags += [] if every is None else ["--preview_every", str(every)]
    dmd.main([*flags, "--output_dir", str(tmp_path / "run")])
    assert shown == expected
    assert (tmp_path / "run" / "samples.png").is_file()  # the end has a picture in any case


# ---- how large -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, size",
    [
        ((20, 3, 256, 256), (3 * 258, 9 * 258)),  # it was 15,400 pixels wide
        ((20, 3, 64, 64), (2 * 194, 13 * 194)),
        ((20, 3, 16, 16), (50, 20 * 50)),
        ((2, 16, 21, 60, 104), (62, 10 * 106)),
        ((6, 16, 21, 60, 104), (2 * 62, 20 * 106)),  # lines break between videos of five frames
        ((2, 3, 1, 40, 3000), (2 * 42, 3002)),
    ],
)
def test_pictures_are_no_wider_than_a_screen(tmp_path, shape, size):
    """One pixel a pixel above 64, three below; long rows go on in the next line."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    image = pictures.picture(x)
    assert image.shape == (*size, 3)
    assert image.shape[1] <= max(pictures.WIDEST, shape[-1] + 2)
    report.save_samples(str(tmp_path), [("data", x), ("student", x)], None)
    assert Image.open(tmp_path / "samples.png").size == (size[1], 2 * (size[0] + 16))
    assert (tmp_path / "samples.gif").exists() == (len(shape) == 5)


def test_lines_hold_every_sample_once():
    x = torch.linspace(-1, 1, 30)[:, None, None, None].expand(-1, 3, 100, 100)
    image = pictures.picture(x)
    assert image.shape == (2 * 102, 25 * 102, 3)
    found = [image[50, 51 + 102 * i, 0] for i in range(25)]
    found += [image[152, 51 + 102 * i, 0] for i in range(5)]
    want = ((x[:, 0, 0, 0] + 1) * 127.5).round()
    assert found == want.byte().tolist()
    assert (image[102:, 5 * 102 :] == 255).all()


@pytest.mark.parametrize("name", ["measured", "full"])
def test_a_row_that_cannot_be_kept_ends_no_run(monkeypatch, tmp_path, capsys, name):
    """The teacher's folder may be another user's, or its disk full; the report is written."""
    found = {"name": "teacher", "fd": 1.0}, (torch.zeros(2), torch.eye(2))
    monkeypatch.setattr(report, "measured", lambda *a: found)
    if name == "full":

        def full(*a):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(report, "save_tensors", full)
    (tmp_path / name).write_text("")  # a file where the folder would be
    teacher = SimpleNamespace(folder=str(tmp_path), fingerprint=lambda: "abc", shift=1.0, over=None)
    run = Run(dmd.parse_args(["--output_dir", str(tmp_path / "run")]), "dmd")
    how = run, teacher, torch.zeros(2), None, "heun32", {"name": "teacher"}
    assert report.measured_teacher(*how) == found
    assert "not kept beside the teacher" in capsys.readouterr().out


def test_a_stored_row_is_of_one_way_to_sample(monkeypatch, tmp_path):
    """Another shift, guidance, rescaling, solver or precision, or other weights: measured anew."""
    how = dict(weights="abc", key="heun32", shift=1.0, scale=1.0, over=None, precision="no")
    ways = [how]
    for name, value in dict(weights="abd", key="euler8", shift=3.0, scale=2.0).items():
        ways.append(how | {name: value})
    ways += [how | {"precision": "bf16"}, how | {"scale": 2.0, "over": 0.7}]
    ways += [how | {"scale": 2.0, "over": 0.5}]

    def row(way, fd):
        def found(*a):
            assert fd is not None, f"measured again: {way}"
            return {"name": "teacher", "fd": fd}, (torch.full([2], fd), torch.eye(2))

        monkeypatch.setattr(report, "measured", found)
        flags = ["--mixed_precision", way["precision"], "--guidance_scale", str(way["scale"])]
        run = Run(dmd.parse_args([*flags, "--output_dir", str(tmp_path / "run")]), "dmd")
        given = dict(folder=str(tmp_path), shift=way["shift"], over=way["over"])
        teacher = SimpleNamespace(fingerprint=lambda: way["weights"], **given)
        label = torch.zeros(2)
        return report.measured_teacher(run, teacher, label, None, way["key"], {"name": "teacher"})

    for i, way in enumerate(ways):
        assert row(way, float(i))[0]["fd"] == i
    for i, way in enumerate(ways):
        found, (mean, _) = row(way, None)
        assert (found["fd"], found["copied"]) == (i, True) and mean.tolist() == [i, i]


def test_what_is_stored_is_of_seed_0_and_named_by_who_asks(monkeypatch, tmp_path):
    """Another seed's noise would unpair fd_teacher of all later runs, also when measured anew."""
    fd = []

    def found(*a):
        fd.append(len(fd) + 1.0)
        return {**a[-1], "fd": fd[-1]}, (torch.full([2], fd[-1]), torch.eye(2))

    monkeypatch.setattr(report, "measured", found)

    def row(*flags, name="teacher"):
        run = Run(dmd.parse_args([*flags, "--output_dir", str(tmp_path / "run")]), "dmd")
        given = dict(folder=str(tmp_path), shift=1.0, over=None, fingerprint=lambda: "abc")
        how = torch.zeros(2), None, "euler20", {"name": name}
        return report.measured_teacher(run, SimpleNamespace(**given), *how)[0]

    assert row("--seed", "7")["fd"] == 1 and not list(tmp_path.rglob("*.safetensors"))
    assert row()["fd"] == 2  # stored
    assert row("--seed", "7", "--remeasure_teacher")["fd"] == 3
    assert row("--seed", "7") == {"name": "teacher", "fd": 2, "copied": True}
    assert row(name="teacher_same_steps") == {"name": "teacher_same_steps", "fd": 2, "copied": True}
    assert row("--remeasure_teacher")["fd"] == 4 == row("--seed", "1")["fd"]


@pytest.mark.parametrize("n, kept", [(8, False), (20, True)])
def test_the_teachers_own_grid_of_many_steps_is_stored(monkeypatch, n, kept):
    """Its row at the student's steps; that of any other grid is none of the teacher's."""
    args = SimpleNamespace(guidance_scale=1, teacher_steps=32)
    run = SimpleNamespace(args=args, main=False, wait_for_all=lambda: None)
    teacher, found = SimpleNamespace(world="glyphs", shift=3.0), []
    monkeypatch.setattr(report, "measure", lambda *a: found.append(a[5]))
    monkeypatch.setattr(report, "teacher_sampler", lambda *a: None)
    monkeypatch.setattr(report, "show", lambda *a: {})
    for shift in (3.0, 1.0):
        report.finish(run, teacher, step_grid(n, shift)[:-1], {}, 0)
    assert found == [f"euler{n}" if kept else None, None]


@pytest.mark.parametrize("asked", [None, "float32", "bf16"])
def test_a_student_is_saved_as_asked_or_as_its_teacher_is(asked):
    run = SimpleNamespace(args=SimpleNamespace(save_dtype=asked))
    for bf16 in (False, True):
        own = report.save_dtype(run, SimpleNamespace(stored_in_bf16=bf16))
        want = bf16 if asked is None else asked == "bf16"
        assert own == (torch.bfloat16 if want else None)


def test_report_without_a_world(tmp_path):
    """The preview's samples are compared with --data, of which random rows are shown, and with the
    many-step teacher's from the same noise."""
    x = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = {"x0": x, "cond.label": torch.arange(30) % 3}
    save_file(data, tmp_path / "data.safetensors")
    real = ["--gan_weight", "0.1", "--data", str(tmp_path / "data.safetensors")]
    shown, whole = {}, report.measure_shown
    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, "measure_shown", lambda x, *more: shown.update(x) or whole(x, *more))
        dmd.main([*flags_for(dmd, tmp_path), *real, "--output_dir", str(tmp_path / "run")])
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["results"]
    names = ["data", "teacher", "teacher_same_steps", "student"]
    assert [r["name"] for r in rows] == names and list(shown)[0] == "data"
    assert [r["nfe"] for r in rows] == [0, 3, 2, 2] and rows[0]["samples"] == 5
    drawn = [next(i for i, item in enumerate(x) if torch.equal(item, d)) for d in shown["data"]]
    assert len(set(drawn)) > 2 and drawn != sorted(drawn)
    student, teacher = shown["student"], shown["teacher"]
    assert torch.equal(student, load_file(tmp_path / "run" / "samples.safetensors")["x0"])
    mse = float((student - teacher).square().mean())
    assert rows[3]["paired_mse"] == pytest.approx(mse, rel=1e-6)
    assert {"patch_swd", "diversity", "patch_swd_teacher", "diversity_teacher"} <= set(rows[3])
    assert "paired_mse" not in rows[1] and "patch_swd" in rows[1] and set(rows[0]) == {
        "name", "nfe", "samples"
    }  # fmt: skip


def test_sets_without_a_world_are_compared():
    """Grain shows, and samples that are alike; a set equals itself; one sample has no diversity."""
    g = torch.Generator().manual_seed(0)
    smooth = torch.randn(20, 3, 1, 1, generator=g).expand(-1, -1, 16, 16)
    grain = smooth + 0.2 * torch.randn(20, 3, 16, 16, generator=g)
    alike = smooth[:1] + 0.1 * smooth
    same, grainy, narrow = (compared(x, smooth) for x in (smooth, grain, alike))
    assert same == {"patch_swd": pytest.approx(0, abs=1e-3), "diversity": pytest.approx(1)}
    assert grainy["patch_swd"] > 100 and narrow["diversity"] == pytest.approx(0.1)
    assert compared(grain[:1], smooth[:1])["diversity"] is None
    video = grain[:, :, None].expand(-1, -1, 3, -1, -1)
    assert compared(video, video)["diversity"] == pytest.approx(1)
