"""How fast text is prepared: beside the tokenizers library alone, and by the number of files.

    python -m tests.benchmarks.bench_prep [--quick] [--datatrove PYTHON]

The tokenizer is trained on the text. "library alone" is encode_batch of the same documents with all
cores, nothing read, checked or written. Each command is a process of its own, started and ended.
"datatrove" is its JsonlReader and DocumentTokenizer with as many workers as cores, run by a Python
that has it (`pip install datatrove[io,processing]`); it reads eight files, as we do in that row.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import results

REPEATS = 3
FILES = 8  # for datatrove, which reads a file by one worker
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    source, tokenizer, out, workers = sys.argv[1:]
    tokens = DocumentTokenizer(
        out, tokenizer_name_or_path=tokenizer, eos_token=None, shuffle_documents=False
    )
    steps = [JsonlReader(source), tokens]
    LocalPipelineExecutor(steps, tasks=8, workers=int(workers), logging_dir=out + "-logs").run()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, nothing written")
    parser.add_argument("--datatrove", metavar="PYTHON", help="of an environment that has it")
    args = parser.parse_args()
    quick = args.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _rows(folder, 2 if quick else 100, 200 if quick else 50_000)
        if args.datatrove:
            rows.append(_beside_datatrove(folder, args.datatrove, 2 if quick else 100, rows[0]))
    text = "# Preparation of text\n\n" + results.circumstances() + "\n"
    text += f"Medians of {REPEATS}; startup of the command is in all but the last column.\n\n"
    text += results.table(rows)
    print(text)
    if not quick:
        results.result_path("prep", ".md").write_text(text)


def _rows(folder: Path, megabytes: int, files: int) -> list[dict[str, object]]:
    dice = random.Random(0)
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(20_000)]
    documents = []
    while sum(map(len, documents)) < megabytes << 20:
        documents.append(" ".join(dice.choices(words, k=700)) + "\n")
    (folder / "text.txt").write_text("".join(documents))
    with (folder / "text.jsonl").open("w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "small").mkdir()
    for i in range(files):
        (folder / "small" / f"{i:06}.txt").write_text(documents[i % len(documents)][:1024])
    tokenizer = _tokenizer(documents[:200], folder / "tokenizer.json")
    small = ("small", len(os.listdir(folder / "small")) * 1024 / 2**20)
    cases = [
        ("bytes, one file", "text.txt", "bytes", megabytes),
        ("bytes, JSON lines", "text.jsonl", "bytes", megabytes),
        (f"bytes, {files:,} files of 1 KB", small[0], "bytes", small[1]),
        ("BPE of 8,000, JSON lines", "text.jsonl", tokenizer, megabytes),
    ]
    alone = _library_seconds(documents, tokenizer)
    start = _seconds(folder, ["nothing.txt"], "bytes")
    rows = []
    for title, source, name, size in cases:
        seconds = statistics.median(_seconds(folder, [source], name) for _ in range(REPEATS))
        work = max(seconds - start, 1e-3)
        rows.append(
            {
                "what": title,
                "MB/s": round(size / seconds, 1),
                "files/s": f"{files / seconds:,.0f}" if source == small[0] else "",
                "library alone, MB/s": round(megabytes / alone, 1) if name != "bytes" else "",
                "without startup, MB/s": round(size / work, 1),
                "datatrove, MB/s": "",
            }
        )
    return rows


def _beside_datatrove(
    folder: Path, python: str, megabytes: int, columns: dict[str, object]
) -> dict[str, object]:
    """The same JSON lines in eight files, by turns."""
    (folder / "parts").mkdir()
    lines = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    for part in range(FILES):
        (folder / "parts" / f"{part}.jsonl").write_text("".join(lines[part::FILES]))
    (folder / "peer.py").write_text(DATATROVE)
    tokenizer = str(folder / "tokenizer.json")
    ours, theirs = [], []
    for repeat in range(REPEATS):
        out = str(folder / f"peer-{repeat}")
        command = [python, "peer.py", "parts", tokenizer, out, str(os.cpu_count())]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        theirs.append(time.perf_counter() - started)
        ours.append(_seconds(folder, ["parts"], tokenizer))
    return dict.fromkeys(columns, "") | {
        "what": f"BPE of 8,000, {FILES} files of JSON lines",
        "MB/s": round(megabytes / statistics.median(ours), 1),
        "datatrove, MB/s": round(megabytes / statistics.median(theirs), 1),
    }


def _tokenizer(texts: list[str], path: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return str(path)


def _library_seconds(documents: list[str], tokenizer: str) -> float:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(tokenizer)
    started = time.perf_counter()
    for begin in range(0, len(documents), 1000):
        backend.encode_batch(documents[begin : begin + 1000], add_special_tokens=False)
    return time.perf_counter() - started


def _seconds(folder: Path, sources: list[str], tokenizer: str) -> float:
    """Of one command, from its start to its end."""
    (folder / "nothing.txt").write_text("a few words\n" * 100)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", "data_prep", *(str(folder / name) for name in sources)]
        command += ["--tokenizer", tokenizer, "--out", f"{out}/set"]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
