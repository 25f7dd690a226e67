"""`dataset_info.json`: data sets by name, as CareGPT and LLaMA-Factory register them.

https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md says what an entry may hold. An entry's columns
and role names are put under ours, and what the row then is, is told from its fields as for any other file.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sources.files import CONTAINERS, list_files
from sources.preferences import to_record
from sources.records import Convert, DataSet, data_sets
from sources.turns import Row, Unusable
from stage import UserError

HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url")
# LLaMA-Factory's name of a column -> the field that formats are told by
FIELDS = {"prompt": "instruction", "query": "input", "response": "output"}
FIELDS |= {name: name for name in ("history", "system", "tools", "images", "videos", "audios")}
FIELDS |= {name: name for name in ("messages", "chosen", "rejected", "kto_tag")}
REQUIRED = {"instruction", "messages", "output", "chosen", "rejected", "kto_tag"}  # where an entry names them
TURNS = ("messages", "conversations", "conversation", "chosen", "rejected")  # fields that may hold messages
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
ROLES = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
ROLES |= {"observation_tag": "observation", "function_tag": "function_call"}


def find_data_sets(names: Iterable[str], registry: Path) -> list[DataSet]:
    """The data sets of these names: of the registry, of files and folders, or of the hub (owner/name).

    A name may hold several, with commas between.
    """
    entries = read_registry(registry) if registry.is_file() else {}
    found: list[DataSet] = []
    for given in names:
        whole = given in entries or (given and Path(given).exists())
        for name in [given] if whole else filter(None, map(str.strip, given.split(","))):
            if name in entries:
                found += registered(name, entries[name], registry)
            elif Path(name).exists() or ("/" in name and Path(name).suffix.lower() in CONTAINERS):
                found += data_sets(Path(name))  # says so where a file is missing
            elif name.count("/") == 1 and not name.startswith((".", "/")):
                found.append(from_hub(name, name, {}, to_record))
            else:
                raise UserError(_unknown(name, entries, registry))
    return found


def _unknown(name: str, entries: dict[str, Any], registry: Path) -> str:
    if not registry.is_file():
        return f"找不到数据集 {name}：没有这个文件，也没有注册表 {registry}；请用 --registry 指明 dataset_info.json。"
    close = get_close_matches(name, entries, 5, 0.4) or list(entries)[:5]
    return f"注册表 {registry} 里没有 {name}；相近的有：{'、'.join(close)}。"


def read_registry(path: Path) -> dict[str, dict[str, Any]]:
    """The entries by name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"注册表 {path} 不是有效的 JSON：{error}。") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise UserError(f'注册表 {path} 应为 {{"名字": {{"file_name": …}}, …}}。')
    return content


def registered(name: str, entry: dict[str, Any], registry: Path) -> list[DataSet]:
    """The files of one entry, or what the hub has under it."""
    convert = converter_of(name, entry, registry)
    number = entry.get("num_samples")
    if number is not None and (type(number) is not int or number <= 0):
        raise UserError(f"注册表 {registry} 的 {name}：num_samples 应为正整数，现在是 {number}。")
    local = registry.parent / str(entry["file_name"]) if entry.get("file_name") else None
    hub = next((entry[key] for key in HUBS if entry.get(key)), None)
    if hub and not (local and local.exists()):
        beside = registry.parent / str(hub)
        return [from_hub(name, str(beside if beside.is_dir() else hub), entry, convert, number, registry)]
    if not local:
        advice = "要运行数据集自带的代码，不支持；请下载其数据文件，改用 file_name"
        wrong = f"script_url {advice}" if entry.get("script_url") else "既没有 file_name 也没有 hf_hub_url"
        raise UserError(f"注册表 {registry} 的 {name}：{wrong}。")
    if not local.exists():
        raise UserError(f"注册表 {registry} 的 {name}：找不到 {local}；请把数据文件放到那里。")
    check_sha1(name, local, entry.get("file_sha1"))
    return [DataSet(name, file, convert, num_samples=number) for file in list_files(local)]


def check_sha1(name: str, file: Path, expected: Any) -> None:
    """Raise UserError if a file is not the one that was registered."""
    if not expected or not file.is_file():
        return
    digest = hashlib.sha1(usedforsecurity=False)
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != str(expected).lower():
        raise UserError(
            f"{file} 的 SHA-1 是 {digest.hexdigest()}，注册表里 {name} 写的是 {expected}："
            "文件不同或不完整。请重新下载；确认要用这个文件，就改掉或删去 file_sha1。"
        )


def converter_of(name: str, entry: dict[str, Any], registry: Path) -> Convert:
    """What makes records of an entry's rows."""
    formatting = entry.get("formatting") or "alpaca"
    columns, renamed = entry.get("columns"), entry.get("tags") or {}
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(
            f"注册表 {registry} 的 {name}：formatting 应为 alpaca、sharegpt 或 openai，现在是 {formatting}。"
        )
    for key, value in (("columns", columns), ("tags", renamed)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"注册表 {registry} 的 {name}：{key} 应为对象。")
    tags = {**TAGS, **renamed}
    # An empty string: there is no such column.
    named = {FIELDS[key]: str(column) for key, column in (columns or {}).items() if key in FIELDS and column}
    ranking = bool(entry.get("ranking"))

    def convert(row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise Unusable("不是 JSON 对象")
        # Without columns the fields tell what a row is, which covers the defaults of both formats and more.
        ours = dict(row) if columns is None else _named(row, named, ranking)
        if renamed or columns is not None:
            ours |= {field: with_our_names(ours[field], tags) for field in TURNS if field in ours}
        record = to_record(ours)
        if ranking and "chosen" not in record:  # else a worse answer might be taken for a good one
            raise Unusable("注册表写明 ranking，但没有较好与较差的两个回答")
        return record

    return convert


def _named(row: Row, columns: dict[str, str], ranking: bool) -> Row:
    """The columns that an entry names, under our names; of preferences also the usual ones, if they are there."""
    missing = [column for field, column in columns.items() if field in REQUIRED and column not in row]
    if missing:
        raise Unusable(f"没有注册表写明的列 {'、'.join(missing)}")
    columns = {**({"chosen": "chosen", "rejected": "rejected"} if ranking else {}), **columns}
    return {field: row[column] for field, column in columns.items() if column in row}


def with_our_names(turns: Any, tags: dict[str, str]) -> Any:
    """A message, or a list of them, with its role and text under role and content; anything else as it is."""
    return [_renamed(turn, tags) for turn in turns] if isinstance(turns, list) else _renamed(turns, tags)


def _renamed(turn: Any, tags: dict[str, str]) -> Any:
    if not isinstance(turn, dict) or tags["role_tag"] not in turn:
        return turn
    role = turn[tags["role_tag"]]
    named = {tags[tag]: ours for tag, ours in ROLES.items()}
    rest = {"tool_calls": turn["tool_calls"]} if turn.get("tool_calls") else {}
    role = named.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": turn.get(tags["content_tag"]), **rest}


def from_hub(
    name: str,
    hub: str,
    entry: dict[str, Any],
    convert: Convert,
    num_samples: int | None = None,
    registry: Path | None = None,
) -> DataSet:
    """A published data set, or a folder that `datasets` understands; it is fetched when it is read."""
    return DataSet(name, Path(hub), convert, _hub_rows(hub, entry, registry), num_samples)


def _hub_rows(hub: str, entry: dict[str, Any], registry: Path | None) -> Callable[[], Iterable[Row]]:
    by_hand = f"用浏览器从 https://huggingface.co/datasets/{hub} 下载数据文件，" + (
        f"放到 {registry.parent} 并在 {registry.name} 里写明 file_name" if registry else "再用 --data 指明它"
    )
    advice = "请检查 split、subset、folder" if Path(hub).is_dir() else f"没有网络时{by_hand}"

    def rows() -> Iterable[Row]:
        if not importlib.util.find_spec("datasets"):
            raise UserError(f"读取 {hub} 需要：pip install datasets；或者{by_hand}。")
        import datasets

        options = {"name": entry.get("subset"), "data_dir": entry.get("folder")}
        try:
            return datasets.load_dataset(hub, split=entry.get("split") or "train", **options)
        except Exception as error:  # of the network, the hub, the files: whatever a foreign library meets
            what = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            raise UserError(f"读取不到 {hub}（{what}）；{advice}。") from error

    return rows
