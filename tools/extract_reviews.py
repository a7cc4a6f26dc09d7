"""Makes tools/data/movie_reviews.jsonl: 1,500 rated movie-review snippets, 1,100 to train on and 400 held out.

The source is the data set of Hutto & Gilbert (2014) in the source distribution of vaderSentiment 3.3.2 (see
tools/data/NOTICE). Rows are chosen and ordered by the hash of their text, so that every run gives the same file.

    python -m tools.extract_reviews                    downloads the source distribution with pip
    python -m tools.extract_reviews --sdist FILE       uses one that is there
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tools.reviews import FILE

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

TRAIN, HELDOUT = 1100, 400  # rows, half of them positive
MIN_RATING = 1.0  # mean of 20 raters on a scale from -4 to 4; snippets nearer to 0 are neutral or disputed


def extract(text: str) -> list[dict[str, object]]:
    """The chosen rows of the source file's text: id, text, label, rating and split."""
    pools: dict[str, list[tuple[str, dict[str, object]]]] = {"positive": [], "negative": []}
    seen: set[str] = set()
    for line in text.splitlines():
        number, rating, snippet = line.split("\t")
        snippet = snippet.strip()
        if abs(float(rating)) < MIN_RATING or snippet.lower() in seen:
            continue
        seen.add(snippet.lower())
        label = "positive" if float(rating) > 0 else "negative"
        row = {"id": int(number), "text": snippet, "label": label, "rating": round(float(rating), 3)}
        pools[label].append((hashlib.sha256(snippet.encode()).hexdigest(), row))
    rows: list[dict[str, object]] = []
    for split, begin, end in (("train", 0, TRAIN // 2), ("heldout", TRAIN // 2, (TRAIN + HELDOUT) // 2)):
        chosen = [item for pool in pools.values() for item in sorted(pool, key=lambda item: item[0])[begin:end]]
        rows += [{**row, "split": split} for _, row in sorted(chosen, key=lambda item: item[0])]
    return rows


def source_text(sdist: Path) -> str:
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, ARCHIVE))) as inner:
        return _member(inner, MEMBER).decode()


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise FileNotFoundError(name)
    return file.read()


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--dest", str(directory)]
    subprocess.run([*command, REQUIREMENT], check=True)
    return next(directory.glob("*.tar.gz"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sdist", type=Path, metavar="FILE", help=f"the source distribution of {REQUIREMENT}")
    parser.add_argument("--output", type=Path, metavar="FILE", default=FILE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = extract(source_text(options.sdist or _download(Path(scratch))))
    options.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.output}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
