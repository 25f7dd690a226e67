"""What every stage shares: atomic outputs, the demo as a fallback, settings that cannot work."""

import os

import pytest
import torch
from conftest import script
from safetensors.torch import save_file

from sources.files import list_files
from sources.published_tokens import published_bins
from stage import UserError, atomic_path, sidecar_path


def test_a_file_or_folder_appears_whole_or_not_at_all(tmp_path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    for content in ("old", "new"):
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        with atomic_path(file) as temporary:
            temporary.write_text(content)
    for path in (folder, file):
        with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
            temporary.mkdir() if path == folder else temporary.write_text("half")
            1 / 0  # noqa: B018
    assert [f.name for f in folder.iterdir()] == ["new"]
    assert file.read_text() == "new"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_what_the_umask_lets_them(tmp_path) -> None:
    """safetensors by itself makes files for their owner alone: no other user could serve them."""
    with atomic_path(tmp_path / "folder") as folder, atomic_path(tmp_path / "file.safetensors") as file:
        folder.mkdir()
        for path in (folder / "model.safetensors", file):
            save_file({"x": torch.zeros(1)}, path)
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    for path in (tmp_path / "folder" / "model.safetensors", tmp_path / "file.safetensors"):
        assert path.stat().st_mode == usual


def test_an_interrupted_swap_brings_the_old_folder_back(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    replace = os.replace

    def interrupted(source, target):
        if ".tmp-" in str(source):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_path(folder) as temporary:
        temporary.mkdir()
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]
    assert [f.name for f in folder.iterdir()] == ["old"]


def test_a_file_never_replaces_a_folder(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="文件夹"), atomic_path(tmp_path / "data") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "data").is_dir()


def test_sidecars_do_not_overwrite_what_they_describe(tmp_path) -> None:
    assert sidecar_path(tmp_path / "a.bin") == tmp_path / "a.json"
    with pytest.raises(UserError, match=r"\.json"):
        sidecar_path(tmp_path / "a.json")
    (tmp_path / "a.txt").write_text("一篇文章，足够长了。\n" * 5, encoding="utf-8")
    for script_name in ("data_process.py", "sft_data_process.py", "train_tokenizer.py"):
        failed = script(script_name, "--data", tmp_path / "a.txt", "--out", tmp_path / "x.json", ok=False)
        assert "x.json" in failed.stderr
    same = ["--out", tmp_path / "x.bin", "--valid", tmp_path / "x.bin"]
    assert "--valid" in script("data_process.py", "--data", tmp_path / "a.txt", *same, ok=False).stderr


def test_no_data_file_is_passed_over_in_silence(tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "part.jsonl").touch()
    data = tmp_path / "data"
    data.mkdir()
    (data / "C4_zh").symlink_to(elsewhere)
    (data / "loop").symlink_to(data)
    for name in ("wiki.json", "wiki.bin", "license_exam.json", "readme_corpus.json", "README.md"):
        (data / name).write_text("[]")
    names = {str(f.relative_to(data)) for f in list_files(data)}
    assert names == {"C4_zh/part.jsonl", "wiki.json", "license_exam.json", "readme_corpus.json"}
    assert [f.name for f in published_bins(data, set())] == ["wiki.bin"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("data_clean/clear.py", ["--threshold", "nan"]),
        ("data_clean/clear.py", ["--num_perm", 10**8]),
        ("data_process.py", ["--valid_fraction", 2]),
        ("sft.py", ["--batch", 0]),
        ("sft.py", ["--valid_fraction", -1]),
        ("train_tokenizer.py", ["--sample_characters", 0]),
        ("eval.py", ["--temperature", "nan"]),
        ("eval.py", ["--top_p", 0]),
        ("pretrain.py", ["--beta1", 2]),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line(name, options) -> None:
    failed = script(name, *options, ok=False)
    assert options[0] in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_outputs_that_cannot_be_written_are_one_clear_line(tmp_path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.txt").write_text("一篇文章，足够长了，有好多好多字。\n", encoding="utf-8")
    failed = script(
        "data_clean/clear.py", "--data", tmp_path / "a.txt", "--out", tmp_path / "file" / "x", ok=False
    )
    assert len(failed.stderr.strip().splitlines()) == 1


def test_no_demo_without_data_says_what_is_missing() -> None:
    failed = script("pretrain.py", "--no_demo", "--data", "nowhere.bin", ok=False)
    assert "nowhere.bin" in failed.stderr
