"""Cleaning on datatrove: the result of the single machine, through the local executor, Slurm (imitated) and Ray."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_perplexity import tiny  # noqa: F401  a checkpoint

from data_clean.duplicates import find_clusters, join_near
from data_clean.keys import keys_of
from data_clean.shards import SLOTS, Documents, write_shard
from data_clean.signatures import sign
from data_clean.tally import CONTAMINATED
from data_clean.texts import from_strings
from stage import UserError
from workers import RESULT, WorkFolder

pytest.importorskip("datatrove")
zstandard = pytest.importorskip("zstandard")
from data_clean import clear, datatrove_blocks, on_datatrove  # noqa: E402

FEW_BANDS = ("--bands", 3, "--num_perm", 18)  # fewer processes to start


def sentence(rng, length):
    return "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(length - 1)) + "。"


def edited(rng, text, edits):
    letters = list(text)
    for place in rng.sample(range(len(letters) - 1), edits):
        letters[place] = chr(0x4E00 + rng.randrange(3000))
    return "".join(letters)


def write_lines(file, texts, *more):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join([*lines, *more]), encoding="utf-8")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Five files of two data sets with duplicates within and across them, dirt, and rows that cannot be read."""
    folder, rng = tmp_path_factory.mktemp("corpus") / "raw", random.Random(0)
    good = [sentence(rng, rng.randrange(60, 150)) for _ in range(400)]
    texts = good + [edited(rng, text, 4) for text in good[:60]] + good[100:130]
    texts += ["略", "哈" * 40, "\ufffd" * 30, "锟斤拷" * 20]
    rng.shuffle(texts)
    for number in range(5):
        file = folder / ("wiki" if number % 2 else "C4_zh") / f"{number}.jsonl"
        write_lines(file, texts[number::5], '{"txt": 1}')
    (folder / "empty.jsonl").touch()
    return folder


def parquet_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.parquet"))}


def texts_in(folder):
    return [
        text for file in sorted(folder.glob("*.parquet")) for text in pq.read_table(file)["text"].to_pylist()
    ]


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def same_result(one, other):
    """The same files, and the same counts in the reports."""
    assert parquet_bytes(one) == parquet_bytes(other) and parquet_bytes(one)
    for part in ("sources", "set_aside"):
        assert report(one)[part] == report(other)[part]
    assert {name: rule["rows"] for name, rule in report(one)["rules"].items()} == {
        name: rule["rows"] for name, rule in report(other)["rules"].items()
    }


def on_cluster(*arguments, ok=True, **options):
    """Run the stage on datatrove as a user does."""
    command = [sys.executable, "-m", "data_clean.on_datatrove", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=600, **options
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def single(raw):
    """The same corpus cleaned by clear.py."""
    out = raw.parent / "single"
    script("data_clean/clear.py", "--data", raw, "--out", out, *FEW_BANDS)
    return out


def test_two_local_workers_equal_the_single_machine_and_go_on(raw, single):
    out = raw.parent / "local"
    command = ("--data", raw, "--out", out, "--tasks", 4, "--workers", 2, *FEW_BANDS)
    assert f"已写入 {out}" in on_cluster(*command).stdout
    same_result(out, single)
    assert pq.read_schema(out / "part-00000.parquet").names == ["text", "source"]

    work = out.with_name(".local.datatrove")
    dropped = dropped_in(work)
    reasons = [row["metadata"]["filter_reason"] for row in dropped]
    stats = json.loads((work / "logs" / "extract" / "stats.json").read_text(encoding="utf-8"))
    counts = {k.removeprefix("dropped_"): v for k, v in stats[1]["stats"].items() if k.startswith("dropped_")}
    assert counts == {reason: reasons.count(reason) for reason in reasons} and len(reasons) == 4
    assert "锟斤拷" * 20 in {row["text"] for row in dropped}

    # Given again, the command does only what is not recorded as done, or is missing.
    done = {file: file.stat().st_mtime_ns for file in work.glob("logs/*/completions/*")}
    again = [
        work / "logs" / step / "completions" / f"{task:05d}"
        for step, task in (("extract", 1), ("publish", 0))
    ]
    again[0].unlink()
    shutil.rmtree(out)
    on_cluster(*command)
    assert {file for file, time in done.items() if file.stat().st_mtime_ns != time} == set(again)
    same_result(out, single)


def dropped_in(work):
    """The documents that the filter has put aside."""
    rows = []
    for file in (work / "dropped").glob("*.jsonl.zst"):
        with zstandard.open(file, "rt", encoding="utf-8") as lines:
            rows += map(json.loads, lines)
    return rows


def test_all_optional_steps(raw, single, tmp_path):
    """Reference documents, common lines, preferred sources, several parts: together, and in other processes."""
    rng = random.Random(3)
    footer = "本页面的文字允许在知识共享协议下修改和再使用。"
    long = [f"{sentence(rng, 3000)}\n{footer}" for _ in range(120)]
    new = tmp_path / "new"
    write_lines(new / "a" / "0.jsonl", long)
    write_lines(new / "b" / "0.jsonl", long + long[:20])
    known = texts_in(single)[:50]
    question = sentence(rng, 40)
    (tmp_path / "题.csv").write_text(f"id,question,A,B,C,D\n0,{question},甲,乙,丙,丁\n", encoding="utf-8")
    write_lines(new / "c.jsonl", [*known, f"{sentence(rng, 100)}\n{question}\nA. 甲\nB. 乙\nC. 丙\nD. 丁"])
    options = [
        "--data", new, "--against", single, "--boilerplate", 5, "--prefer", "b", "--part_mb", 1,
        "--benchmarks", tmp_path / "题.csv", "--to_simplified", *FEW_BANDS,
    ]  # fmt: skip
    script("data_clean/clear.py", "--out", tmp_path / "single", *options)
    on_cluster("--out", tmp_path / "many", "--workers", 1, *options)
    same_result(tmp_path / "many", tmp_path / "single")
    assert len(parquet_bytes(tmp_path / "many")) > 1
    texts = texts_in(tmp_path / "many")
    assert len(texts) == 120 and not any(footer in text or question in text for text in texts)
    (dropped,) = dropped_in(tmp_path / ".many.datatrove")
    assert question in dropped["text"] and dropped["metadata"]["filter_reason"] == CONTAMINATED


def test_filter_by_a_model(raw, tiny, tmp_path):  # noqa: F811
    options = ["--data", raw, "--model", tiny, "--min_bits", 9, "--max_bits", 11, *FEW_BANDS]
    script("data_clean/clear.py", "--out", tmp_path / "single", *options)
    on_cluster("--out", tmp_path / "many", "--workers", 1, *options)
    same_result(tmp_path / "many", tmp_path / "single")
    assert len(texts_in(tmp_path / "many")) < 390


# --- the steps of deduplication, against the function of the single machine ---


def make_plan(folder, groups, cfg, references=0):
    """A work folder as the first step leaves it, a shard for every group of (text, source)."""
    work = WorkFolder(folder, {})
    jobs = []
    for number, group in enumerate(groups):
        texts = from_strings([text for text, _ in group])
        order = np.arange(number << 40, (number << 40) + len(group), dtype=np.uint64)
        documents = Documents(texts, np.array([source for _, source in group], object), order)
        slots = np.random.default_rng(number).integers(0, SLOTS, len(group))
        task = work.folder("extract", number)
        task.mkdir(parents=True)
        names = []
        if group:
            names = [write_shard(task / "000", [documents], [sign(keys_of(texts), cfg.duplicates)], slots)]
        (task / RESULT).write_text(json.dumps({"shards": names}), encoding="utf-8")
        jobs.append(clear.ExtractJob(number, None, None, number < references))
    return datatrove_blocks.Plan(cfg, jobs, work)


def kept_on_cluster(plan, tasks):
    """What the steps keep, done by so many tasks."""
    steps = (("equal", datatrove_blocks.find_equal, 1), ("similar", datatrove_blocks.find_similar, tasks))
    for step, function, count in (*steps, ("choose", datatrove_blocks.choose_kept, 1)):
        for number in range(count):
            folder = plan.work.folder(step, number)
            folder.mkdir(parents=True)
            function(datatrove_blocks.Work(plan, number, count), folder)
    return np.load(plan.work.folder("choose", 0) / "keep.npy")


def near_groups(rng, count):
    """Documents in groups, most of them more or less changed copies of a few; and some without any letter."""
    bases = [sentence(rng, rng.randrange(20, 60)) for _ in range(4)]
    return [
        [
            (edited(rng, base, rng.randrange(12)) if rng.random() < 0.9 else "。", rng.choice("ab"))
            for base in rng.choices(bases, k=rng.randrange(12))
        ]
        for _ in range(count)
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(["minhash", "minhash", "simhash", "none"]),
)
def test_distributed_clusters_equal_find_clusters(tmp_path_factory, rng, count, shares, method):
    cfg = on_datatrove.Config(dedup=method, bands=4, num_perm=16, threshold=0.4)
    plan = make_plan(tmp_path_factory.mktemp("work"), near_groups(rng, count), cfg, references=count // 3)
    corpus = plan.corpus()
    expected = ~corpus.is_reference(np.arange(len(corpus)))
    if len(corpus):
        found = find_clusters(corpus, cfg.duplicates, join_near)
        expected[found.members[found.members != found.kept]] = False
    kept = kept_on_cluster(plan, 4 * shares if method == "minhash" else 1)
    assert (kept == expected).all()


def test_pairs_are_verified_and_apart_in_their_bucket(tmp_path):
    """Documents of one template share buckets and stay; a duplicate is found though others lie between."""
    rng = random.Random(5)
    template = sentence(rng, 60)
    facts = [f"{template[:30]}{sentence(rng, 30)}{template[30:]}{sentence(rng, 30)}" for _ in range(300)]
    near = edited(rng, facts[0], 2)
    groups = [[(text, "a") for text in facts], [(near, "b")]]
    kept = kept_on_cluster(make_plan(tmp_path, groups, on_datatrove.Config()), 21)
    assert kept[1:300].all() and kept[0] != kept[300]


def test_a_filter_of_datatrove_fits_between(raw, tmp_path):
    from datatrove.pipeline.filters import LambdaFilter

    cfg = on_datatrove.Config(data=raw, out=tmp_path / "out", workers=1, tasks=2)
    plan = datatrove_blocks.Plan(cfg, clear.extract_jobs(cfg), WorkFolder(tmp_path / "work", {}).__enter__())
    pipelines = on_datatrove.stages(plan)
    reader, cleaning, shards = pipelines[0].pipeline
    long = LambdaFilter(lambda document: len(document.text) >= 100)
    pipelines[0] = pipelines[0]._replace(pipeline=[reader, cleaning, long, shards])
    on_datatrove.run_locally(cfg, pipelines, plan.work)
    texts = texts_in(tmp_path / "out")
    assert texts and all(len(text) >= 100 for text in texts)


# --- clusters ---

SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
with open("{log}", "a") as log:
    print(*sys.argv[1:-1], script, file=log, flush=True)
    if "merge_stats" not in script:
        for task in range(int(re.search(r"--array=0-(\\d+)", script)[1]) + 1):
            env = os.environ | dict(SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", RUN_OFFSET="0")
            subprocess.run(["bash", sys.argv[-1]], env=env, stdout=log, stderr=log)
print("Submitted batch job", 1000 + script.count("clean-") )
"""


@pytest.mark.skipif(os.name == "nt", reason="Slurm runs on Linux")
def test_slurm_jobs(raw, single, tmp_path):
    """`sbatch` here runs the tasks of an array at once; scripts, dependencies and the result are checked."""
    commands = {
        "sbatch": SBATCH.format(python=sys.executable, log=tmp_path / "jobs"),
        "srun": '#!/bin/bash\nwhile [[ $1 == -* || $1 == [0-9]* ]]; do shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    on_slurm = ("--executor", "slurm", "--partition", "cpu", "--tasks", 1, "--time", "2:00:00", "--mem_gb", 3)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = on_cluster(
        "--data",
        raw,
        "--out",
        out,
        *FEW_BANDS,
        *on_slurm,
        "--sbatch",
        "account=lab",
        "qos=high",
        env=environment,
    )
    log = (tmp_path / "jobs").read_text()
    same_result(out, single)
    first = (out.with_name(".out.datatrove") / "logs" / "extract" / "launch_script.slurm").read_text()
    for option in ("partition=cpu", "time=2:00:00", "mem-per-cpu=3G", "array=0-0", "account=lab", "qos=high"):
        assert f"#SBATCH --{option}\n" in first
    assert "PYTHONPATH=" + str(ROOT) in first
    names = ["extract", "equal", "similar", "choose", "write", "publish"]
    assert [line.split("clean-")[1] for line in log.splitlines() if "job-name" in line][::2] == names
    assert log.count("--dependency=afterok:") >= len(names) - 1
    assert "已提交 6 个作业" in done.stdout


def test_ray(raw, single, tmp_path):
    pytest.importorskip("ray")
    command = ("--data", raw, "--out", tmp_path / "out", "--executor", "ray", "--mem_gb", 1, "--tasks", 2)
    on_cluster(*command, "--workers", 2, *FEW_BANDS)
    same_result(tmp_path / "out", single)


# --- mistakes ---


def test_mistakes_end_in_one_line(raw, tmp_path, monkeypatch):
    out = ("--data", raw, "--out", tmp_path / "out")
    assert "--partition" in on_cluster(*out, "--executor", "slurm", ok=False).stderr
    assert "选项=值" in on_cluster(*out, "--sbatch", "account", ok=False).stderr
    assert "找不到" in on_cluster("--data", tmp_path / "none", "--out", tmp_path / "out", ok=False).stderr
    (tmp_path / "poor.jsonl").write_text('{"text": "略"}', encoding="utf-8")
    poor = on_cluster("--data", tmp_path / "poor.jsonl", "--out", tmp_path / "out", *FEW_BANDS, ok=False)
    assert "没有一篇可用" in poor.stderr and not (tmp_path / "out").exists()
    monkeypatch.setattr(on_datatrove, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-cluster"):
        on_datatrove.need_packages(on_datatrove.Config())
