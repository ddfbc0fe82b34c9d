"""dmd.py's flags for training in two stages, for other steps and for data: runs from end to end."""

import pytest
import torch
from helpers import (
    Diary,
    perturbed,
    quiet,
    read_log,
    refusal_of,
    ring_flags,
    ring_network,
    ring_run,
    save_tiny_pixart,
    save_tiny_wan,
    save_tiny_z_image,
)
from safetensors.torch import load_file, save_file

import decoupled_dmd
import dmd
from models.files import load_json
from models.networks import network_config, save_network
from models.networks.ring_mlp import RingMLP
from models.plumbing.run import Run

MAKERS = {
    "wan": save_tiny_wan,
    "z_image": save_tiny_z_image,
    "pixart": lambda root: save_tiny_pixart(root, 512),
    "pixart_1024": lambda root: save_tiny_pixart(root, 1024),
}

STAGE_1 = "--ema_decay 0.9 --fake_update_ratio 1".split()


def fake_at_start(monkeypatch, folder, *flags, steps=1):
    """The weights of a run's fake and student before its first update. The run goes on after it."""
    start = {}

    def on_start(real, run, **state):
        real(run, **state)
        for name in ("fake", "student"):
            start[name] = {k: v.clone() for k, v in state[name].state_dict().items()}

    with monkeypatch.context() as m:
        diary = Diary(m, dmd)
        diary.wrap(m, Run, "start", on_start)
        dmd.main(ring_flags(folder, steps, 8, *flags))
    return start["fake"], start["student"]


# ---- two stages ----------------------------------------------------------------------------------


def test_second_stage_starts_where_the_first_ended(monkeypatch, tmp_path):
    """--student_init RUN --fake_init RUN: the average of the student, the fake of the newest state.

    The fake is not the teacher that it was at first, a GAN and other rates join, and the networks
    move on.
    """
    with monkeypatch.context() as m:
        first = ring_run(m, dmd, tmp_path / "one", *STAGE_1)
    states = sorted((tmp_path / "one" / "state").glob("step-*"))
    saved = load_file(states[-1] / "state.safetensors")
    one = str(tmp_path / "one")
    flags = ["--student_init", one, "--fake_init", one, "--gan_weight", "0.1"]
    flags += "--learning_rate 1e-5 --learning_rate_fake 2e-5".split()
    fake, student = fake_at_start(monkeypatch, tmp_path / "two", *flags)
    assert {f"fake.{k}" for k in fake} == {k for k in saved if k.startswith("fake.")}
    assert all(torch.equal(v, saved[f"fake.{k}"]) for k, v in fake.items())
    assert all(torch.equal(v, fake[k]) for k, v in first.fake.state_dict().items())
    teacher = ring_network(0).state_dict()
    assert any(not torch.equal(v, teacher[k]) for k, v in fake.items())
    average = load_file(tmp_path / "one" / "student" / "diffusion_pytorch_model.safetensors")
    assert average.keys() == student.keys()
    assert all(torch.equal(v, student[k]) for k, v in average.items())
    (row,) = read_log(tmp_path / "two")
    assert "loss_gan" in row and "loss_dm" in row and "loss_gan" not in read_log(one)[0]


def test_fake_of_one_step_starts_one_of_several(monkeypatch, tmp_path):
    """From one step to four: the fake's new input, the student's step, starts at zero."""
    with monkeypatch.context() as m:
        first = ring_run(m, dmd, tmp_path / "one", *STAGE_1)
    flags = ["--fake_init", str(tmp_path / "one"), "--student_steps", "4"]
    fake, _ = fake_at_start(monkeypatch, tmp_path / "four", *flags)
    known = first.fake.state_dict()
    new = fake.keys() - known.keys()
    assert new and all(k.startswith("steps.") and not fake[k].any() for k in new)
    assert all(torch.equal(fake[k], v) for k, v in known.items())
    with monkeypatch.context() as m:  # and of four steps one of four
        four = ring_run(m, dmd, tmp_path / "again", *STAGE_1, "--student_steps", "4")
    flags[1] = str(tmp_path / "again")
    fake, _ = fake_at_start(monkeypatch, tmp_path / "more", *flags)
    assert all(torch.equal(fake[k], v) for k, v in four.fake.state_dict().items())


def test_fake_init_takes_a_network_folder(monkeypatch, tmp_path):
    net = perturbed(ring_network(0), 5)
    save_network(net, network_config(net), str(tmp_path / "net"))
    fake, _ = fake_at_start(monkeypatch, tmp_path / "run", "--fake_init", str(tmp_path / "net"))
    assert all(torch.equal(fake[k], v) for k, v in net.state_dict().items())


def test_what_fake_init_refuses(monkeypatch, tmp_path, capsys):
    """A student, which is no score; other shapes; a fake that knows steps, for a run of one."""
    quiet(monkeypatch)
    dmd.main(ring_flags(tmp_path / "four", 1, 4, "--student_steps", "4"))
    wide = RingMLP(dim=64)
    save_network(wide, network_config(wide), str(tmp_path / "wide"))

    def refused(folder, *flags):
        given = ["--fake_init", str(tmp_path / folder), *flags]
        return refusal_of(capsys, dmd.main, *ring_flags(tmp_path / "run", 1, 4, *given))

    assert "four/student is a student, no score: give its run" in refused("four/student")
    for folder, flags in (("wide", []), ("four", []), ("four", ["--student_steps", "1"])):
        assert "it has no fake of this run's shapes" in refused(folder, *flags)
    assert "nowhere" in refused("nowhere")
    assert not (tmp_path / "run").exists()
    dmd.main(
        ring_flags(
            tmp_path / "run",
            1,
            4,
            "--fake_init",
            str(tmp_path / "four"),
            *"""
        --student_steps 4""".split(),
        )
    )  # what the message says works


def test_resumed_run_keeps_its_own_fake(monkeypatch, tmp_path):
    """--fake_init starts a run; on resume the run's own state counts."""
    with monkeypatch.context() as m:
        ring_run(m, dmd, tmp_path / "one", *STAGE_1)
    flags = ["--fake_init", str(tmp_path / "one"), "--lr_decay_share", "0"]
    fake_at_start(monkeypatch, tmp_path / "two", *flags, steps=2)
    saved = load_file(tmp_path / "two" / "state" / "step-0000002" / "state.safetensors")
    more = [*flags, "--resume_from_checkpoint", "latest"]
    fake, _ = fake_at_start(monkeypatch, tmp_path / "two", *more, steps=3)
    assert all(torch.equal(v, saved[f"fake.{k}"]) for k, v in fake.items())


# ---- the weight of the matching loss -------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--gan_weight 0.1", "--regression_weight 1"])
def test_without_matching(monkeypatch, tmp_path, flags):
    """--dm_weight 0: the GAN alone, as in DMD2's Table 3, or a warm-up on the teacher's ODE pairs.

    With the latter no fake is trained or asked, and the teacher only for its pairs.
    """
    more = [*flags.split(), "--regression_pairs", "16", "--teacher_steps", "2", "--dm_weight", "0"]
    diary = ring_run(monkeypatch, dmd, tmp_path, *more, "--fake_update_ratio", "1")
    row = read_log(tmp_path)[-1]
    assert not {"loss_dm", "g_dm", "dm_cos", "dm_rel_gap"} & set(row)
    gan = "gan" in flags
    assert diary.updates == (["student", "fake"] if gan else ["student"]) * 3
    assert ("loss_d" in row) == ("loss_fake" in row) == gan
    later = {c.who for turn in diary.turns[1:] for c in turn}
    assert later == ({"student", "fake"} if gan else {"student"})
    moved = [
        not torch.equal(a, b)
        for a, b in zip(diary.student.parameters(), ring_network(0).parameters())
    ]
    assert any(moved)


def test_scores_in_the_log(monkeypatch, tmp_path):
    """dm_cos and dm_rel_gap are the mean cosine and relative gap of what the loss matched."""
    seen = []

    def on_loss(real, *args):
        loss, g, mu_real, mu_fake = real(*args)
        cos = torch.nn.functional.cosine_similarity(mu_real, mu_fake).mean()
        seen.append((cos, ((mu_fake - mu_real).norm(dim=1) / mu_real.norm(dim=1)).mean()))
        return loss, g, mu_real, mu_fake

    diary = Diary(monkeypatch, dmd)
    diary.wrap(monkeypatch, dmd, "dmd_loss", on_loss)
    flags = ["--learning_rate_fake", "0.1", "--gradient_accumulation_steps", "2"]
    dmd.main(ring_flags(tmp_path, 3, 8, *flags))
    for i, row in enumerate(read_log(tmp_path)):
        cos, gap = (sum(v) / 2 for v in zip(*seen[2 * i : 2 * i + 2]))
        assert float(row["dm_cos"]) == pytest.approx(float(cos), rel=1e-3)
        assert float(row["dm_rel_gap"]) == pytest.approx(float(gap), rel=1e-3)
        assert float(gap) > 1e-3


# ---- the student's steps in t --------------------------------------------------------------------


@pytest.mark.parametrize("times", [[0.4], [1.0, 0.9, 0.3]])
def test_student_times(monkeypatch, tmp_path, times):
    """SDXL's one step at index 399, or any: in training, in the sampler, in sampler.json.

    The noise of the first step stays pure noise, and the shift does not touch the times.
    """
    flags = ["--student_times", *map(str, times), "--timestep_shift", "3"]
    diary = ring_run(monkeypatch, dmd, tmp_path, *flags, steps=8)
    calls = [c for turn in diary.turns for c in turn if c.who == "student"]
    assert {round(t, 6) for c in calls for t in c.t.tolist()} == set(times)
    assert len(times) > 1 or all(length == 0 for length, _ in diary.rollouts)
    first = [c.x_t[(c.t - times[0]).abs() < 1e-6] for c in calls]
    assert abs(torch.cat(first).std() - 1) < 0.1
    assert ("steps.weight" in diary.fake.state_dict()) == (len(times) > 1)
    sampler = load_json(str(tmp_path / "student" / "sampler.json"))
    assert sampler["times"] == times
    asked = []

    def net(x_t, t):
        asked.append(round(float(t[0]), 6))
        return x_t

    dmd.sample(net, diary.teacher.diffusion, lambda n: torch.ones(2, 2), times, {})
    assert asked == times


# ---- what the papers prescribe for a teacher -----------------------------------------------------

DMD2 = dict(adam_betas=[0.9, 0.999], weight_decay=0.01, ema_decay=0, fake_update_ratio=5)
DMD2 |= dict(lr_warmup_steps=100, lr_decay_share=0, max_grad_norm=10)
PRESCRIBED = [  # Self-Forcing's for Wan; DMD2's for SDXL; the authors' of Z-Image-Turbo
    (dmd, save_tiny_wan, dict(learning_rate=2e-6, learning_rate_fake=4e-7, student_steps=4)),
    (dmd, save_tiny_wan, dict(adam_betas=[0.0, 0.999], ema_decay=0.99, dm_range=[0.02, 0.98])),
    (dmd, MAKERS["pixart"], dict(learning_rate=5e-7, learning_rate_fake=5e-7, **DMD2)),
    (decoupled_dmd, save_tiny_z_image, dict(student_steps=8, dm_range=[0, 1], ca_range=[0, 1])),
    (decoupled_dmd, save_tiny_z_image, dict(adam_betas=[0.9, 0.999], schedule="hybrid")),
    (decoupled_dmd, MAKERS["pixart"], dict(student_steps=4)),
]


@pytest.mark.parametrize("script, make, means", PRESCRIBED)
def test_defaults_of_released_teachers(tmp_path, script, make, means):
    """By the class of the network, read from the folder."""
    make(tmp_path / "root")
    given = ["--teacher", str(tmp_path / "root"), "--prompts", "prompts.safetensors"]
    args = vars(script.parse_args(given))
    assert {name: args[name] for name in means} == means


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = [
    ("--dm_weight 0", "--dm_weight 0 leaves nothing to learn from: give --gan_weight or"),
    ("--dm_weight -1", "--dm_weight: must be >= 0"),
    ("--dm_weight 0 --no_fake_score --regression_weight 1", "leave one of them out"),
    ("--no_fake_score --fake_init x", "--fake_init: nothing reads the fake score here"),
    ("--dm_weight 0 --regression_weight 1 --fake_init x", "--fake_init: nothing reads the fake"),
    ("--student_times 0.5 0.5", "--student_times must descend, got 0.5 0.5"),
    ("--student_times 0.2 0.9", "--student_times must descend, got 0.2 0.9"),
    ("--student_times 0", "--student_times: must be > 0 and <= 1"),
    ("--student_times 1.2", "--student_times: must be > 0 and <= 1"),
    ("--student_times 1 0.5 --regression_weight 1", "--regression_weight is DMD v1"),
]


@pytest.mark.parametrize("flags, says", REFUSED)
def test_refusals(tmp_path, capsys, flags, says):
    """One line, exit code 2, nothing written."""
    given = ring_flags(tmp_path / "run", 1, 4, *flags.split())
    assert says in refusal_of(capsys, dmd.main, *given)
    assert not (tmp_path / "run").exists()


# ---- real data with captions ---------------------------------------------------------------------


def captioned(root, prompts):
    """A file as `models.encode --images --captions` writes it: 3 latents with their captions."""
    conditions = {k: v for k, v in load_file(prompts).items() if k.startswith("cond.")}
    g, shape = (
        torch.Generator().manual_seed(2),
        (3, 4, 2, 4, 6) if "wan" in str(root) else (3, 4, 4, 6),
    )
    rows = {"x0": torch.randn(shape, generator=g)}
    rows |= {k: v[:3].contiguous() for k, v in conditions.items()}
    save_file(rows, str(root / "data.safetensors"))
    return str(root / "data.safetensors")


@pytest.mark.parametrize("name", MAKERS)
def test_gan_on_a_text_teacher(monkeypatch, tmp_path, name):
    """--data FILE.safetensors with x0 and the captions' cond.*: real samples of a text teacher.

    Each row comes with its own caption.
    """
    seen = []

    def on_turn(real, fake, head, diffusion, x, noise, cond, x_real, noise_real, cond_real):
        seen.append((x_real, {k: v for k, v in cond_real.items() if k != "steps"}))
        both = x, noise, cond, x_real, noise_real, cond_real
        return real(fake, head, diffusion, *both)

    root = tmp_path / name
    flags = MAKERS[name](root)
    data = captioned(root, root / "prompts.safetensors")
    quiet(monkeypatch)
    Diary.wrap(monkeypatch, dmd, "discriminator_loss_on", on_turn)
    flags += ["--data", data, "--gan_weight", "0.1", "--max_train_steps", "1"]
    flags += ["--train_batch_size", "4", "--output_dir", str(tmp_path / "run")]
    dmd.main(flags)
    (row,) = read_log(tmp_path / "run")
    assert {"loss_d", "loss_gan", "g_gan"} <= set(row) and float(row["g_gan"]) > 0
    file = load_file(data)
    for x_real, cond in seen:
        for i, x in enumerate(x_real):
            which = [k for k in range(3) if torch.equal(file["x0"][k], x)]
            assert len(which) == 1
            text = file["cond.text"][which[0]]
            assert torch.equal(cond["text"][i, : len(text)], text[: cond["text"].shape[1]])


# ---- rates of small teachers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, rate, rate_fake",
    [
        ("", 1.2e-3, 1.6e-3),
        ("--student_steps 4", 4e-4, 2e-3),
        ("--student_times 1 0.5", 4e-4, 2e-3),
        ("--teacher clips --student_steps 4", 4e-4, 2e-3),
        ("--teacher ring --student_steps 4", 5e-4, 1e-3),
        ("--student_steps 4 --learning_rate 1e-3", 1e-3, 2e-3),
    ],
)
def test_several_steps_have_rates_of_their_own(flags, rate, rate_fake):
    """At those of one step four come to fd 4.2 on glyphs in 600 updates, at these to 2.2."""
    args = dmd.parse_args(flags.split())
    assert (args.learning_rate, args.learning_rate_fake) == (rate, rate_fake)
