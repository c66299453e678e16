"""`python -m routedvit.describe` prints what a model costs, or what is wrong in one line."""

import pytest
import timm

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


def test_exported_weights_say_what_they_were_made_with(tmp_path):
    made = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "q_capacity": 0.5}
    model = timm.create_model("colt5_vit_test", **made)
    timm.models.save_for_hf(model, str(tmp_path), model_args=made, safe_serialization=True)
    expected = describe.describe("colt5_vit_test", **made).removeprefix("colt5_vit_test")
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        assert describe.describe(name) == f"local-dir:{tmp_path}{expected}"


def test_a_run_folder_is_told_where_its_weights_are(capsys, tmp_path):
    for _ in range(2):
        assert describe.main([str(tmp_path)]) == 2
        assert f"the folder of its weights, {tmp_path}/weights" in capsys.readouterr().err
        (tmp_path / "config.json").write_text('{"config": {}, "git_revision": "", "versions": {}}')


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["colt5_vit_x"], "'colt5_vit_x' is unknown; name a folder of exported weights, or choose"),
        (["local-dir:nowhere"], "local-dir:nowhere"),
        (["resnet18"], "resnet18"),
        (["colt5_vit_b", "--img-size", "9"], "img_size=9"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, named):
    assert describe.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
