"""Looks at what the README's first commands made: the figures, the report and the picture. Exit code 1 where one is not good.

python .ci/check_run.py RUN PICTURE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LEAST_DB = 50.0  # mean PSNR of an engine's pictures against float's; 52.2 to 52.9 dB were seen


def faults(run: Path, picture: Path) -> list[str]:
    """Return what is wrong with a finished run of the bundled PixArt and a picture of it, a sentence each."""
    from PIL import Image, ImageStat

    wrong = []
    engines = {row["name"]: row for row in json.loads((run / "compare.json").read_text(encoding="utf-8"))["engines"]}
    wrong += [f"{name} was not compared with float" for name in ("onnxruntime", "openvino") if name not in engines]
    for name, row in engines.items():
        if name != "float":
            print(f"ci: {name}: {row['psnr_db_mean']:.2f} dB (worst {row['psnr_db_min']:.2f})", file=sys.stderr)
            if not row["psnr_db_mean"] >= LEAST_DB:
                wrong.append(f"the pictures of {name} have {row['psnr_db_mean']:.2f} dB, {LEAST_DB:g} are asked for")
    report = run / "report.html"
    if not report.is_file() or "</html>" not in report.read_text(encoding="utf-8"):
        wrong.append(f"there is no whole report at {report}")
    with Image.open(picture) as image:
        image.load()
        if min(ImageStat.Stat(image.convert("RGB")).stddev) < 1:
            wrong.append(f"{picture} is of one colour")
    return wrong


if __name__ == "__main__":
    found = faults(Path(sys.argv[1]), Path(sys.argv[2]))
    for sentence in found:
        print(f"ci: {sentence}", file=sys.stderr)
    sys.exit(1 if found else 0)
