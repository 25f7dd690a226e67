"""Stage 0 through its command line: what is kept, what is dropped, and that the result is the same every time."""

import gzip
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import edited

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def command(*args, script="data_clean/clear.py"):
    return [sys.executable, script, *map(str, args)]


def clear(*args, cwd=ROOT, script="data_clean/clear.py", **options):
    """Run the stage as a user does; never a traceback."""
    result = subprocess.run(
        command(*args, script=script), cwd=cwd, capture_output=True, text=True, encoding="utf-8", **options
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result


def cleaned(*args):
    """Run the stage with success; returns its rows, texts and sources, and its report."""
    result = clear(*args)
    assert result.returncode == 0, result.stderr
    out = Path(args[args.index("--out") + 1])
    assert not list(out.parent.glob(f".{out.name}.*"))  # no intermediate files stay
    return read_clean(out), json.loads((out / "report.json").read_text(encoding="utf-8"))


def read_clean(folder):
    return [row for shard in sorted(folder.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.parquet"))}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def sentence(rng, length=60):
    return "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(length - 1)) + "。"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A small corpus of several formats with planted dirt; returns its folder and the good texts."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    good = [sentence(rng, 80) for _ in range(300)]
    near = [edited(rng, text, 3) for text in good[:20]]
    bad = ["略", "哈" * 40, "�" * 20, ""]
    rows = [{"text": text} for text in [*good[:150], *good[:10], *near, *bad]] + [{"txt": 1}, {"text": None}]
    write_lines(folder / "raw" / "C4_zh" / "part-0.jsonl", rows)
    wiki = [{"completion": text, "source": "wiki"} for text in good[150:]]
    (folder / "raw" / "wiki.json").write_text(json.dumps(wiki, ensure_ascii=False), encoding="utf-8")
    (folder / "raw" / "gbk.txt").write_bytes("一些文字\n更多文字\n".encode("gbk"))
    return folder, good


def test_command_line(raw):
    folder, good = raw
    out = folder / "clean"
    result = clear("--data", folder / "raw", "--out", out)
    assert result.returncode == 0, result.stderr
    rows = read_clean(out)
    assert sorted(row["text"] for row in rows) == sorted(good)
    assert {row["source"] for row in rows} == {"C4_zh", "wiki"}
    assert len({row["source"] for row in rows[:20]}) == 2  # shuffled
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    counts = {name: rule["rows"] for name, rule in report["rules"].items()}
    assert counts["完全重复"] == 10 and counts["近似重复"] == 20 and sum(counts.values()) == 33
    assert report["set_aside"]["rows"] == 4
    assert all(step["rows_in"] >= step["rows_out"] for step in report["steps"])
    for source in report["sources"].values():
        assert source["rows_in"] == source["rows_out"] + sum(source["dropped"].values())
    assert all(example["similarity"] >= 0.65 for example in report["rules"]["近似重复"]["examples"])
    assert "近似去重" in result.stdout and "iconv -f GBK" in result.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "近似重复" in page and not re.search("(src|href)=.http", page)  # works without a network


def test_same_bytes_whatever_the_workers(tmp_path):
    big = tmp_path / "raw" / "big"
    rng = random.Random(1)
    for number in range(4):
        write_lines(big / f"{number}.jsonl", [{"text": sentence(rng, 300)} for _ in range(500)])
    for name, workers in (("one", 1), ("two", 2)):
        cleaned("--data", tmp_path / "raw", "--out", tmp_path / name, "--part_mb", 1, "--workers", workers)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert len(bytes_of(tmp_path / "one")) == 2


def test_simhash_none_reference_and_running_from_its_folder(raw):
    folder, good = raw
    for options in (("--dedup", "none"), ("--dedup", "simhash"), ("--engine", "reference")):
        args = ("--data", folder / "raw", "--out", folder / options[1], *options)
        result = clear(*args, cwd=ROOT / "data_clean", script="clear.py")
        assert result.returncode == 0, result.stderr
        assert len(good) <= len(read_clean(folder / options[1])) <= 320
    assert bytes_of(folder / "reference") == bytes_of(folder / "clean")


def test_preferred_source_and_comparison_with_a_cleaned_corpus(raw, tmp_path):
    folder, good = raw
    rng = random.Random(7)
    write_lines(tmp_path / "more" / "extra.jsonl", [{"text": edited(rng, text, 2)} for text in good[:50]])
    write_lines(tmp_path / "more" / "other.jsonl", [{"text": text} for text in good[30:60]])
    rows, _ = cleaned("--data", tmp_path / "more", "--out", tmp_path / "a", "--prefer", "other", "extra")
    assert sum(row["source"] == "other" for row in rows) == 30 and len(rows) == 60
    cleaned("--data", folder / "raw", "--out", tmp_path / "old")
    new = [sentence(rng, 90) for _ in range(20)]
    write_lines(tmp_path / "more" / "new.jsonl", [{"text": text} for text in new])
    rows, report = cleaned(
        "--data", tmp_path / "more", "--out", tmp_path / "b", "--against", tmp_path / "old"
    )
    assert sorted(row["text"] for row in rows) == sorted(new)
    assert set(report["sources"]) == {"extra", "other", "new"}
    # An older result below the corpus is no corpus.
    shutil.copytree(tmp_path / "old", tmp_path / "more" / "old")
    _, again = cleaned(
        "--data", tmp_path / "more", "--out", tmp_path / "c", "--against", tmp_path / "more" / "old"
    )
    assert again["sources"] == report["sources"]


def test_lines_that_many_documents_share(tmp_path):
    rng = random.Random(3)
    notice = "本站所有文章均来自网络，版权归原作者所有，如有侵权请与我们联系。"
    texts = [sentence(rng, 100) for _ in range(60)]
    rows = [{"text": f"{notice}\n{text}\n{notice}" if i < 30 else text} for i, text in enumerate(texts)]
    rows += [{"text": notice + "\n" + "短"}]
    write_lines(tmp_path / "raw.jsonl", rows)
    found, report = cleaned("--data", tmp_path / "raw.jsonl", "--out", tmp_path / "out", "--boilerplate", 20)
    assert sorted(row["text"] for row in found) == sorted(texts)
    assert [step["step"] for step in report["steps"]].count("剔除公共行") == 1
    for source in report["sources"].values():
        assert source["rows_in"] == source["rows_out"] + sum(source["dropped"].values())


def test_benchmark_questions_are_removed_and_listed(tmp_path):
    rng = random.Random(4)
    questions = [sentence(rng, 50) for _ in range(5)]
    header = "question,A,B,C,D,answer\n"
    (tmp_path / "bench.csv").write_text(
        header + "".join(f"{q},甲,乙,丙,丁,A\n" for q in questions), encoding="utf-8"
    )
    good = [sentence(rng, 200) for _ in range(30)]
    write_lines(
        tmp_path / "raw.jsonl", [{"text": text} for text in [*good, sentence(rng, 80) + questions[2]]]
    )
    rows, report = cleaned(
        "--data", tmp_path / "raw.jsonl", "--out", tmp_path / "out", "--benchmarks", tmp_path / "bench.csv"
    )
    assert sorted(row["text"] for row in rows) == sorted(good)
    (name,) = [name for name in report["rules"] if "评测" in name]
    assert report["rules"][name]["rows"] == 1
    assert questions[2][:20] in json.dumps(report, ensure_ascii=False) and "bench.csv" in json.dumps(report)


# --- interruptions, limits, mistakes ---


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A corpus that takes some seconds, in several pieces, and its result."""
    folder, rng = tmp_path_factory.mktemp("longer"), random.Random(5)
    texts = [sentence(rng, 400) for _ in range(1500)]
    for number in range(6):
        rows = [{"text": edited(rng, rng.choice(texts), 8)} for _ in range(2500)]
        write_lines(folder / "raw" / f"{number}.jsonl", rows)
    cleaned("--data", folder / "raw", "--out", folder / "out", "--part_mb", 1)
    return folder


def test_killed_at_any_moment_the_rerun_gives_the_same_bytes(longer, tmp_path):
    args = ("--data", longer / "raw", "--out", tmp_path / "out", "--part_mb", 1)
    start = time.perf_counter()
    subprocess.run(command(*args), cwd=ROOT, capture_output=True, check=True)
    whole = time.perf_counter() - start
    expected = bytes_of(longer / "out")
    assert bytes_of(tmp_path / "out") == expected
    rng = random.Random(6)
    for _ in range(2):
        shutil.rmtree(tmp_path / "out")
        for _ in range(3):  # the same run is killed again and again
            process = subprocess.Popen(
                command(*args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(rng.uniform(0.2, 1) * whole)
            process.send_signal(signal.SIGKILL)
            process.wait()
        cleaned(*args)
        assert bytes_of(tmp_path / "out") == expected


def test_finished_pieces_are_not_done_again(longer, tmp_path):
    args = ("--data", longer / "raw", "--out", tmp_path / "out", "--workers", 1)
    process = subprocess.Popen(command(*args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = tmp_path / ".out.work" / "extract" / "000002" / "result.json"
    while not done.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = done.stat().st_ino
    process = subprocess.Popen(command(*args), cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert "从上次中断的地方继续" in process.stdout.readline()
    assert done.stat().st_ino == before
    assert process.wait() == 0
    process.stdout.close()
    rows, _ = cleaned("--data", longer / "raw", "--out", tmp_path / "again")
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in read_clean(tmp_path / "out"))


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root"
)
def test_full_disk_is_said_and_leaves_nothing_half_written(longer, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        result = clear("--data", longer / "raw", "--out", disk / "out")
        assert result.returncode and "磁盘已满" in result.stderr
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Four times the text, the same memory; files mapped from the disk do not count, they can be dropped."""
    rng, peaks = random.Random(8), []
    for files in (2, 8):
        folder = tmp_path / f"{files}"
        for number in range(files):
            letters = sentence(rng, 300_000)
            starts = [rng.randrange(298_000) for _ in range(15_000)]
            write_lines(folder / f"{number}.jsonl", [{"text": letters[i : i + 1500] + "。"} for i in starts])
        process = subprocess.Popen(
            command("--data", folder, "--out", tmp_path / f"out{files}", "--workers", 1, "--part_mb", 32),
            cwd=ROOT, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        peaks.append(0)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peaks[-1] = max(peaks[-1], *map(int, re.findall(r"RssAnon:\s+(\d+)", status) or [0]))
            time.sleep(0.01)
        assert process.returncode == 0
    assert peaks[1] < 1.5 * peaks[0]  # a busy machine samples the shorter run less finely


def test_mistakes_end_in_one_line(tmp_path):
    result = clear("--data", tmp_path / "missing", "--out", tmp_path / "out")
    assert result.returncode and "找不到" in result.stderr
    (tmp_path / "empty.jsonl").touch()
    result = clear("--data", tmp_path, "--out", tmp_path / "out")
    assert result.returncode and "没有一篇可用" in result.stderr and "空文件" in result.stdout
    assert not (tmp_path / "out").exists()
    result = clear("--data", tmp_path / "empty.jsonl", "--out", tmp_path)
    assert result.returncode and "会被覆盖" in result.stderr and (tmp_path / "empty.jsonl").exists()
    assert clear("--treshold", 1).returncode
    write_lines(tmp_path / "good.jsonl", [{"text": sentence(random.Random(0), 50)}])
    for option, value in (
        ("--preset", "novel"), ("--rule", "过短"), ("--rule", "没有这条=3"), ("--block_words", "missing.txt"),
        ("--against", "missing"), ("--benchmarks", "missing.csv"), ("--prefer", "nobody"), ("--threshold", "nan"),
    ):  # fmt: skip
        result = clear("--data", tmp_path / "good.jsonl", "--out", tmp_path / "out", option, value)
        assert result.returncode and value.partition("=")[0] in result.stderr, (option, result.stderr)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared development data is not here")
def test_tang_poems_survive(tmp_path):
    with gzip.open(SHARED / "pretrain" / "tang_poems.jsonl.gz", "rt", encoding="utf-8") as lines:
        poems = tmp_path / "poems.jsonl"
        poems.write_text("".join(itertools.islice(lines, 0, None, 4)), encoding="utf-8")
    rows, report = cleaned("--data", poems, "--out", tmp_path / "clean", "--preset", "poetry")
    rules = {name: rule["rows"] for name, rule in report["rules"].items()}
    assert len(rows) > 13_900
    # Lone surviving lines are short, mutilated poems have few characters left; the rest are duplicates.
    assert sum(rules.values()) - rules["完全重复"] - rules["近似重复"] < 100
