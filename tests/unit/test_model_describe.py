"""`python -m routedvit.describe` prints what a model costs, or what is wrong in one line."""

import pytest

from routedvit import describe


def test_table_has_parameters_and_flops_beside_the_dense_twin(capsys):
    assert describe.main(["colt5_vit_b", "--img-size", "224"]) == 0
    out = capsys.readouterr().out
    assert "100.79 M parameters, dense twin 86.57 M" in out
    rows = {line[:26].strip(): line[26:].split() for line in out.splitlines()[3:]}
    assert rows["dense twin"] == ["0.00", "35.45", "0.00", "35.68", "100%"]
    assert rows["as built"] == rows["q, ffn 1/4  kv 1/2"]
    shares = [int(row[-1].rstrip("%")) for row in list(rows.values())[2:]]
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["colt5_vit_x"], "colt5_vit_x"),
        (["resnet18"], "resnet18"),
        (["colt5_vit_b", "--img-size", "9"], "img_size=9"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, named):
    assert describe.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
