"""The benchmark of distillation, on few and short texts."""

import re

from benchmarks.distillation import batch_of, draw, half, main
from models.llama import load_config, load_pretrained


def test_the_table_has_a_row_for_each_seed(assets_dir, capsys):
    main(str(assets_dir / "stories260k" / "hf"), seeds=2, texts=32, tokens=16)
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) \| ([\d.]+) \|$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1"] and rows[0][1:] != rows[1][1:]
    for _, hard, distilled, difference, teacher in rows:
        assert abs(float(distilled) - float(hard) - float(difference)) < 2e-4
        assert float(teacher) < float(distilled) < 6.3 and float(teacher) < float(hard) < 6.3
    assert re.search(r"better for [012] of 2 seeds", out)


def test_texts_are_the_teachers_and_begin_with_bos(assets_dir):
    teacher = load_pretrained(assets_dir / "stories260k" / "hf")
    texts = draw(teacher, 1, 3, 40)
    assert texts.shape == (3, 41) and (texts[:, 0] == 1).all() and len({tuple(text) for text in texts}) == 3
    batch = batch_of(texts)
    assert (batch.tokens_BT[:, 1:] == batch.targets_BT[:, :-1]).all() and batch.weights_BT.all()


def test_the_student_has_half_the_width(assets_dir):
    whole = load_config(assets_dir / "stories260k" / "hf")
    student = half(whole)
    assert student.hidden_size == 32 == whole.hidden_size // 2
    assert (student.num_heads, student.num_kv_heads, student.head_dim, student.num_layers) == (4, 2, 8, 5)
