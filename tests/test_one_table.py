"""tests/one_table.py: finished runs as one Markdown table."""

import pytest

from models.files import UserError, save_json
from tests.one_table import main


def stored(folder, seed, fd, **more):
    """A run's folder with a report of a student of four steps and of its teacher."""
    teacher = {"name": "teacher", "nfe": 63, "fd": 2.0, "guidance_scale": 1.0}
    few = {"name": "teacher_same_steps", "nfe": 4, "fd": 8.0, "fd_teacher": 5.0}
    student = {"name": "student", "nfe": 4, "fd": fd, "fd_teacher": 1.5, "accuracy": 0.99}
    report = {"method": "dmd", "teacher": "glyphs", "seed": seed, "steps": 10, "seconds": 120}
    report["results"] = [{"name": "data", "nfe": 0, "fd": 1.0}, teacher, few, student]
    report.update(more)
    folder.mkdir()
    save_json(report, str(folder / "report.json"))
    return str(folder)


def cells_of(capsys):
    return [
        [c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.split("\n")
    ]


def test_a_row_has_the_seeds_in_order(tmp_path, capsys):
    runs = [stored(tmp_path / "a", 0, 3.0), stored(tmp_path / "b", 1, 2.0, seconds=60)]
    main([f"default={','.join(runs)}"])
    head, _, row, _ = cells_of(capsys)
    found = dict(zip(head, row))
    assert found["fd"] == "3, 2" and found["fd_teacher"] == "1.5" and found["ratio"] == "1.25"
    assert found["teacher in full: fd (calls)"] == "2 (63)" and found["calls"] == "4"
    assert found["teacher in as many steps: fd"] == "8" and found["minutes"] == "1.0"
    assert found["motion"] == ""


def test_a_guided_teacher_is_what_its_student_is_compared_with(tmp_path, capsys):
    run = stored(tmp_path / "a", 0, 3.0)
    rows = [
        {"name": "teacher", "nfe": 126, "fd": 20.0, "guidance_scale": 3.0},
        {"name": "teacher_same_steps", "nfe": 8, "fd": 27.0, "fd_teacher": 5.0},
        {"name": "student", "nfe": 4, "fd": 26.0, "fd_teacher": 10.0},
    ]
    guided = stored(tmp_path / "b", 0, 3.0, results=rows)
    main([f"default={run}", f"guided={guided}"])
    head, _, _, row, _ = cells_of(capsys)
    found = dict(zip(head, row))
    assert found["ratio"] == "2.00" and found["its fd_teacher"] == "5"


def test_what_is_not_a_row(tmp_path, capsys):
    runs = [stored(tmp_path / "a", 0, 3.0), stored(tmp_path / "b", 1, 2.0, steps=20)]
    with pytest.raises(UserError, match="runs of other scripts, teachers or lengths"):
        main([f"default={','.join(runs)}"])
    with pytest.raises(UserError, match="TITLE=RUN"):
        main(runs)
    with pytest.raises(UserError, match="nowhere"):
        main([f"default={tmp_path}/nowhere"])
