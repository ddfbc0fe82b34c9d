"""models/prompts.py: prompts without padding and in shards, written bit by bit and gone on with."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ENV, ROOT, quiet, read_log, refusal_of, save_tiny_wan, without_time
from safetensors.torch import load_file, save_file

import dmd
from models import encode, prompts, text_encoders
from models.files import UserError, save_json, save_tensors
from models.plumbing.data import Prompts, load_conditions
from models.prompts import PromptWriter, open_prompts, split_rows

# Of each: name and mask of the input, tokens of a batch (None: the longest prompt's), dtype.
WAN = "text", "", 16, torch.bfloat16
Z_IMAGE = "text", "text_mask", None, torch.bfloat16
PIXART = "text", "mask", 12, torch.float16
TRELLIS = "tokens", "", 7, torch.float16
KINDS = pytest.mark.parametrize(
    "kind", [WAN, Z_IMAGE, PIXART, TRELLIS], ids=["wan", "z_image", "pixart", "trellis"]
)
LENGTHS = [3, 11, 1, 5, 7, 2, 9]  # of seven prompts; the last is the negative prompt's
WIDTH = 6


def rows_of(kind):
    """Random tokens of the prompts, the negative one last."""
    g, lengths = torch.Generator().manual_seed(0), [7] * 7 if kind is TRELLIS else LENGTHS
    return [torch.randn(n, WIDTH, generator=g).to(kind[3]) for n in lengths]


def padded_file(path, kind, rows):
    """The file with padding, as models.encode wrote it before."""
    name, mask, length, _ = kind
    full = []
    for row in rows:
        padded = row.new_zeros(length or max(map(len, rows)), WIDTH)
        padded[: len(row)] = row
        keep = torch.arange(len(padded)) < len(row)
        full.append({name: padded, mask: keep} if mask else {name: padded})
    stacked = {k: torch.stack([row[k] for row in full]) for k in full[0]}
    cond = {f"cond.{k}": v[:-1] for k, v in stacked.items()}
    save_tensors(cond | {f"uncond.{k}": v[-1:] for k, v in stacked.items()}, str(path))


def writer_of(path, kind, rows, shard_bytes=2**30, fingerprint="a", beside=None):
    name, mask, length, _ = kind
    lengths = torch.tensor([len(row) for row in rows[:-1]])
    padded_to = length or max(map(len, rows))
    about = {"padded_to": str(padded_to), "mask": mask, "fingerprint": fingerprint}
    return PromptWriter(str(path), name, lengths, rows[-1], about, shard_bytes, beside)


def write(path, kind, rows, *more):
    with writer_of(path, kind, rows, *more) as writer:
        for row in rows[writer.done : -1]:
            writer.write(row)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what a batch has ----------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [2**30, 150])
@KINDS
def test_batches_are_those_of_the_padded_file(tmp_path, kind, shard_bytes):
    """Bit for bit: conditions in any order, the unconditional row, masks, the fingerprint."""
    rows, inputs = rows_of(kind), [n for n in kind[:2] if n]
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    padded_file(old, kind, rows)
    write(new, kind, rows, shard_bytes)
    assert new.exists() == (shard_bytes > 150)
    if shard_bytes == 150:
        many = len(names_in(tmp_path)) - 2
        assert many > 2 and f"new-00001-of-{many:05d}.safetensors" in names_in(tmp_path)
    both = [Prompts(str(path), inputs, {kind[0]: WIDTH}) for path in (old, new)]
    assert both[0].n == both[1].n == 6 and both[0].fingerprint() == both[1].fingerprint()
    index = torch.tensor([5, 0, 3, 3, 1, 2, 4])
    with torch.autocast("cpu", torch.bfloat16):  # where float16 cannot be stacked
        batches = [p.rows(index, "cpu") for p in both], [p.unconditional(2, "cpu") for p in both]
    for a, b in batches:
        assert a.keys() == b.keys() == set(inputs)
        for name in inputs:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    for path in (old, new):
        length = both[0].rows(index, "cpu")[kind[0]].shape[1]
        want = {kind[0]: (length, WIDTH)} | ({kind[1]: (length,)} if kind[1] else {})
        file = open_prompts(path)
        names = [key[5:] for key in file.keys() if key.startswith("cond.")]
        assert {k: tuple(file.get_slice(f"cond.{k}").get_shape()[1:]) for k in names} == want
    total = sum(len(row) for row in rows[:-1]) * WIDTH * 2
    files = [path for path in tmp_path.glob("new*.safetensors")]
    assert sum(load_file(p)[f"cond.{kind[0]}"].nbytes for p in files) == total


@pytest.mark.parametrize("shard_bytes", [2**30, 150])
@KINDS
def test_what_a_prompt_has_once(tmp_path, kind, shard_bytes):
    """Beside the tokens, in one file and in shards; a file that ends anywhere is gone on with."""
    rows, path, size = rows_of(kind), tmp_path / "p.safetensors", torch.arange(6)
    g = torch.Generator().manual_seed(1)
    pooled = [torch.randn(3, generator=g).to(kind[3]) for _ in rows]

    def run(stop=None):
        once = {"pooled": pooled[-1], "size": size}
        with writer_of(path, kind, rows, shard_bytes, "a", once) as writer:
            done = writer.done
            for i in range(done, stop or len(rows) - 1):
                writer.write(rows[i], pooled=pooled[i], size=size + i)
            if stop:
                raise KeyboardInterrupt
        return done

    with pytest.raises(KeyboardInterrupt):
        run(4)
    last = max((tmp_path / "p.safetensors.partial").iterdir(), key=lambda path: path.name)
    os.truncate(last, last.stat().st_size - 1)  # of the fourth prompt
    with pytest.raises(ValueError, match="prompt 3: no size and no pooled"):
        once = {"pooled": pooled[-1], "size": size}
        writer_of(path, kind, rows, shard_bytes, "a", once).write(rows[3])
    assert run() == 3
    file = Prompts(str(path), [name for name in (*kind[:2], "pooled", "size") if name], {})
    index = torch.tensor([5, 0, 3])
    batch = file.rows(index, "cpu")
    assert torch.equal(batch["pooled"], torch.stack([pooled[i] for i in index]).float())
    assert torch.equal(batch["size"], index[:, None] + size)
    null = file.unconditional(2, "cpu")
    assert torch.equal(null["pooled"], torch.stack([pooled[-1]] * 2).float())
    assert null["size"].tolist() == [size.tolist()] * 2
    for i, text in zip(index, batch[kind[0]]):
        assert torch.equal(text[: len(rows[i])], rows[i].float()) and not text[len(rows[i]) :].any()


def test_the_index_is_a_name_too_and_sampling_takes_shards(tmp_path):
    rows, path = rows_of(TRELLIS), tmp_path / "tokens.safetensors"
    write(path, TRELLIS, rows, 150)
    for name in (path, f"{path}.index.json"):
        got = open_prompts(name).get_tensor("cond.tokens")
        assert torch.equal(got, torch.stack(rows[:-1]))
    net = type("Net", (), {"cond_names": ("tokens",)})()
    cond, uncond = load_conditions(str(path), net).pick(torch.tensor([4, 2]), "cpu")
    assert torch.equal(cond["tokens"], torch.stack([rows[4], rows[2]]).float())
    assert torch.equal(uncond["tokens"][0], rows[-1].float())


def test_a_run_reads_shards_as_it_reads_padded_prompts(monkeypatch, tmp_path):
    """Two updates have the same losses to the last digit."""
    flags = save_tiny_wan(tmp_path / "wan")
    padded = tmp_path / "wan" / "prompts.safetensors"
    tensors = load_file(padded)
    rows = [*tensors["cond.text"], *tensors["uncond.text"]]
    rows = [row[: 1 + i] for i, row in enumerate(rows)]
    for i, row in enumerate(tensors["cond.text"]):
        row[1 + i :] = 0
    save_file(tensors, padded)
    width, kind = rows[0].shape[1], ("text", "", 6, torch.float32)
    write(tmp_path / "p.safetensors", kind, rows, 8 * width * 4)
    assert not (tmp_path / "p.safetensors").exists()
    quiet(monkeypatch)
    logs = []
    for name in (padded, tmp_path / "p.safetensors"):
        out = tmp_path / f"run-{len(logs)}"
        more = ["--prompts", str(name), "--max_train_steps", "2", "--train_batch_size", "4"]
        dmd.main([*flags, *more, "--output_dir", str(out)])
        logs.append(without_time(read_log(out)))
    assert len(logs[0]) == 2 and logs[0] == logs[1]


@pytest.mark.parametrize("most, want", [(100, [(0, 4)]), (5, [(0, 2), (2, 3), (3, 4)]), (1, None)])
def test_split_rows(most, want):
    """As many prompts as fit; one that does not fit alone has a shard of its own."""
    want = want or [(i, i + 1) for i in range(4)]
    assert split_rows(torch.tensor([2, 3, 9, 1]), most) == want


# ---- interrupted ---------------------------------------------------------------------------------

# An encoder of random features, which are those of the prompt's number: "NUMBER TOKENS" a line.
FAKE = """
import os, signal, torch
from models import encode, text_encoders
def fake(width, kill=0):
    calls = []
    def count(prompts):
        return [int(prompt.split()[1]) for prompt in prompts]
    def features(prompts):
        calls.append(prompts)
        if len(calls) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        lengths = torch.tensor(count(prompts))
        text = torch.zeros(len(prompts), max(lengths), width)
        for row, prompt, n in zip(text, prompts, lengths):
            seed = torch.Generator().manual_seed(int(prompt.split()[0]))
            row[:n] = torch.randn(n, width, generator=seed)
        return {"text": text}, torch.arange(max(lengths)) < lengths[:, None]
    def load(folder, max_length):
        return text_encoders.Encoder(count, features, lambda prompt: features([prompt]))
    family = text_encoders.Family(load, 512, "max_length", folders=("text_encoder",))
    text_encoders.FAMILIES["WanPipeline"] = family
    return calls
"""
ALONE = """
import resource, sys
calls = fake(int(sys.argv[1]), int(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encode.main(sys.argv[3:])
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


class Command:
    """models.encode with FAKE, on prompts of these lengths, in this process or in its own."""

    def __init__(self, root, monkeypatch, capsys):
        self.root, self.capsys = root, capsys
        (root / "wan" / "text_encoder").mkdir(parents=True)
        save_json({"_class_name": "WanPipeline"}, str(root / "wan" / "model_index.json"))
        monkeypatch.setattr(text_encoders, "FAMILIES", dict(text_encoders.FAMILIES))
        self.names = {}
        exec(FAKE, self.names)

    def flags(self, lengths, *more, output="p.safetensors"):
        text = "".join(f"{i} {n}\n" for i, n in enumerate(lengths))
        (self.root / "prompts.txt").write_text(text)
        given = ["--teacher", self.root / "wan", "--prompts_txt", self.root / "prompts.txt"]
        given += ["--output", self.root / output, "--negative_prompt", "999 3", *more]
        return list(map(str, given))

    def __call__(self, lengths, *more, **where):
        """-> what it prints, and how often the encoder is called."""
        calls = self.names["fake"](8)
        encode.main(self.flags(lengths, *more, **where))
        return self.capsys.readouterr().out, len(calls)

    def alone(self, lengths, *more, kill=0, width=8):
        """kill: the call of the encoder at which it dies.  -> the ended process"""
        flags = [str(width), str(kill), *self.flags(lengths, *more)]
        command = [sys.executable, "-c", FAKE + ALONE, *flags]
        return subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    return Command(tmp_path, monkeypatch, capsys)


MANY = [3 + 5 * i % 17 for i in range(20)]  # tokens of 20 prompts


def contents(folder, stem):
    """{name less stem: bytes}."""
    return {p.name.removeprefix(stem): p.read_bytes() for p in folder.glob(f"{stem}[.-]*")}


# 8 numbers of 4 bytes a token: shards of 60 tokens. The first call is the negative prompt's.
@pytest.mark.parametrize(
    "flags, kill, done",
    [(["--batch_size", 3, "--shard_gb", 60 * 32e-9], 5, 9), ([], 8, 6)],
    ids=["shards", "one file"],
)
def test_killed_runs_go_on(command, tmp_path, flags, kill, done):
    """kill -9 at a batch: the same command says where it goes on, encodes what is left, and leaves
    the files of a run that was not killed, byte for byte."""
    ended = command.alone(MANY, *flags, kill=kill)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "p.safetensors").exists()
    with pytest.raises(UserError, match="is not finished: give the python -m models.encode"):
        open_prompts(tmp_path / "p.safetensors")
    out, calls = command(MANY, *flags)
    size = 3 if flags else 1
    assert f"p.safetensors: going on after {done} of 20 prompts" in out
    assert calls == 1 + -(-(20 - done) // size)
    out, calls = command(MANY, *flags, output="whole.safetensors")
    assert "going on" not in out and calls == 1 + -(-20 // size)
    got, want = contents(tmp_path, "p"), contents(tmp_path, "whole")
    assert len(want) == (5 if flags else 1)
    assert {k: v.replace(b"whole-", b"p-") for k, v in want.items()} == got


def test_batches_are_those_of_a_run_that_was_not_interrupted(command, monkeypatch):
    """Where a row was the last on disk, its batch is encoded again as a whole."""
    real, rows = PromptWriter.write, []

    def write(writer, text):
        rows.append(text)
        if len(rows) == 9:
            raise KeyboardInterrupt
        real(writer, text)

    with monkeypatch.context() as m:
        m.setattr(prompts.PromptWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            command(MANY, "--batch_size", "3")
    out, calls = command(MANY, "--batch_size", "3")
    assert "going on after 8 of 20 prompts" in out and calls == 1 + 5


def test_a_row_that_is_on_disk_in_part_is_written_again(tmp_path):
    """Whatever the size at which a file ends, from nothing to all of it."""
    rows, path = rows_of(Z_IMAGE), tmp_path / "p.safetensors"
    write(tmp_path / "whole.safetensors", Z_IMAGE, rows)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    head = len(whole) - sum(map(len, rows[:-1])) * WIDTH * 2
    partial = tmp_path / "p.safetensors.partial" / "p.safetensors"
    seen = set()
    for size in [0, 5, head - 1, *range(head, len(whole) + 1, 7), len(whole)]:
        partial.parent.mkdir()
        partial.write_bytes(whole[:size])
        with writer_of(path, Z_IMAGE, rows) as writer:
            seen.add(writer.done)
            for row in rows[writer.done : -1]:
                writer.write(row)
        assert path.read_bytes() == whole and not partial.parent.exists()
        path.unlink()
    assert seen == set(range(7))


@pytest.mark.parametrize("moves", range(5))
def test_killed_while_shards_are_moved(tmp_path, monkeypatch, moves):
    """Nothing is encoded again, and what was called so before is gone."""
    path, rows = tmp_path / "p.safetensors", rows_of(PIXART)
    write(path, PIXART, rows[:3], 2**30, "old")

    class Killed(Exception):
        pass

    real, count = os.replace, []

    def replace(*pair):
        count.append(pair)
        if len(count) > moves:
            raise Killed
        real(*pair)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            write(path, PIXART, rows, 150)
    assert Prompts(str(path), ["text"], {}).n == 2  # the old ones, until all is in place
    with writer_of(path, PIXART, rows, 150) as writer:
        assert writer.done == 6
    assert Prompts(str(path), ["text", "mask"], {}).n == 6 and not path.exists()
    whole = [name for name in names_in(tmp_path) if ".tmp-" not in name]  # which the killed left
    assert len(whole) == 1 + len(writer.shards) == 5


def test_a_finished_command_and_another_one(command, tmp_path):
    """Given again it does nothing; others replace what is there, with its shards."""
    shards = ["--shard_gb", 60 * 32e-9]
    out, _ = command(MANY, *shards)
    assert "cond.text (20, 512, 8) torch.float32, uncond.text (1, 512, 8)" in out
    before = contents(tmp_path, "p")
    assert len(before) == 5
    again, calls = command(MANY, *shards)
    assert "is there already, of the same prompts and settings" in again and out in again
    assert calls == 0 and contents(tmp_path, "p") == before
    command(MANY)  # one file
    assert names_in(tmp_path) == ["p.safetensors", "prompts.txt", "wan"]
    command(MANY[:9], *shards)
    assert set(contents(tmp_path, "p")) == {
        *("-00001-of-00002.safetensors", "-00002-of-00002.safetensors"),
        ".safetensors.index.json",
    }
    assert Prompts(str(tmp_path / "p.safetensors"), ["text"], {}).n == 9
    command(MANY, *shards)
    assert contents(tmp_path, "p") == before


@pytest.mark.parametrize("what", ["prompts", "settings", "shards", "encoder"])
def test_other_prompts_or_settings_are_not_mixed(command, tmp_path, monkeypatch, capsys, what):
    partial = tmp_path / "p.safetensors.partial"
    with monkeypatch.context() as m:
        m.setattr(prompts.PromptWriter, "_finish", lambda writer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(MANY)
    before = contents(partial, "p")
    flags = {"settings": ["--max_length", 100], "shards": ["--shard_gb", 1]}.get(what, [])
    if what == "encoder":
        (tmp_path / "wan" / "text_encoder" / "model.safetensors").write_bytes(b"other")
    flags = command.flags([*MANY, 5] if what == "prompts" else MANY, *flags)
    calls = command.names["fake"](8)
    line = refusal_of(capsys, encode.main, *flags)
    assert "is of an interrupted python -m models.encode with other prompts or settings" in line
    assert before and contents(partial, "p") == before and not calls
    with pytest.raises(UserError, match="with other prompts or settings"):
        writer_of(tmp_path / "p.safetensors", WAN, rows_of(WAN), 150)


def test_memory_is_that_of_a_batch(command, tmp_path):
    """2,000 prompts of some 506 tokens of width 64 are 259 MB; a batch of 8 is 1 MB."""
    lengths = [500 + i % 13 for i in range(2000)]
    done = command.alone(lengths, "--batch_size", 8, "--shard_gb", 0.1, width=64)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("grown")[1]) < 40e3, done.stdout  # kB
    file = Prompts(str(tmp_path / "p.safetensors"), ["text"], {})
    row = torch.randn(lengths[1500], 64, generator=torch.Generator().manual_seed(1500))
    got = file.rows(torch.tensor([1500]), "cpu")["text"][0]
    assert torch.equal(got[: len(row)], row) and not got[len(row) :].any() and len(got) == 512


# ---- broken files --------------------------------------------------------------------------------


def break_set(path, how):
    """Damage one of the shards of path, or the index.  -> what is opened then"""
    index = f"{path}.index.json"
    about = json.loads(open(index).read())
    first, second = (os.path.join(path.parent, e["file"]) for e in about["shards"][:2])
    if how == "missing":
        os.remove(second)
    elif how == "truncated":
        os.truncate(second, os.path.getsize(second) - 1)
    elif how == "truncated everywhere":
        os.truncate(second, os.path.getsize(second) - 1)
        about["shards"][1]["bytes"] -= 1
    elif how == "foreign":
        write(path.parent / "q.safetensors", Z_IMAGE, rows_of(Z_IMAGE), 150, "other")
        other = os.path.join(path.parent, os.path.basename(second).replace("p-", "q-"))
        os.replace(other, second)
    elif how == "diffusers":
        about = {"metadata": {}, "weight_map": {"a": "b"}}
    elif how == "folder":
        about["shards"][0]["file"] = "../p"
    save_json(about, index)
    return first if how == "alone" else path


@pytest.mark.parametrize(
    "how, says",
    [
        ("missing", "shard 2 of 4 of .*, does not exist: copy it again, or encode all again"),
        ("truncated", r"shard 2 of 4 of .*, has \d+ bytes instead of \d+: copy it again"),
        ("truncated everywhere", "is truncated or not a safetensors file"),
        ("foreign", "its shards are of different encodings: encode all again"),
        ("diffusers", "is not as python -m models.encode writes it .no list of shards"),
        ("folder", "is not as python -m models.encode writes it .no list of shards"),
        ("alone", "is one shard of several: pass .*p.safetensors, the name of them all"),
    ],
)
def test_broken_sets_end_in_one_line(tmp_path, how, says):
    path = tmp_path / "p.safetensors"
    write(path, Z_IMAGE, rows_of(Z_IMAGE), 150)
    broken = break_set(path, how)
    with pytest.raises(UserError, match=says) as error:
        Prompts(str(broken), ["text", "text_mask"], {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "offsets, padded_to, says",
    [
        ([0, 2, 5], None, "no padded_to"),
        ([0, 2, 5], "many", "no padded_to"),
        ([0, 2, 4], "3", "offsets from 0 to 4, 5 rows"),
        ([1, 2, 5], "3", "offsets from 1 to 5, 5 rows"),
        ([0, 5, 5], "5", "prompts of 0 to 5 tokens"),
        ([0, 2, 5], "2", "prompts of 2 to 3 tokens"),
        ([0.0, 2.0, 5.0], "3", "offsets are torch.float32"),
    ],
)
def test_broken_offsets_end_in_one_line(tmp_path, offsets, padded_to, says):
    path = str(tmp_path / "p.safetensors")
    tensors = {"cond.text": torch.ones(5, 4), "uncond.text": torch.ones(1, 4)}
    tensors["cond.offsets"] = torch.tensor(offsets)
    save_tensors(tensors, path, {} if padded_to is None else {"padded_to": padded_to})
    with pytest.raises(UserError, match=f"p.safetensors is not as python -m .*{says}"):
        Prompts(path, ["text"], {})


def test_rows_that_are_not_finite_are_found_before_training(tmp_path):
    rows = rows_of(PIXART)
    rows[4][1, 2] = float("inf")
    write(tmp_path / "p.safetensors", PIXART, rows, 150)
    with pytest.raises(UserError, match="row 4 of cond.text has numbers that are not finite"):
        Prompts(str(tmp_path / "p.safetensors"), ["text", "mask"], {})


def test_a_disk_that_is_full_keeps_what_is_whole(command, tmp_path, monkeypatch):
    """An error in the middle is one line, and the command goes on when there is room again."""
    real, rows = PromptWriter.write, []

    def full(writer, text):
        rows.append(text)
        if len(rows) == 3:
            raise OSError(28, "No space left on device")
        real(writer, text)

    with monkeypatch.context() as m:
        m.setattr(prompts.PromptWriter, "write", full)
        with pytest.raises(OSError, match="No space left on device"):  # for run_main
            command(MANY)
    assert "going on after 2 of 20 prompts" in command(MANY)[0]
    assert names_in(tmp_path) == ["p.safetensors", "prompts.txt", "wan"]
