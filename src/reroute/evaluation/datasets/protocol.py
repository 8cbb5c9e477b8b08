"""The two published ways to ask LLaVA-1.5: words, images, boxes. The facts, and where they stand.

| | "lmms-eval" (default) | "llava" | "qwen" (default for Qwen-VL) |
|---|---|---|---|
| image | as it is; the CLIP processor crops its centre | padded to a square, left or top gets the smaller half | as it is |
| box in an answer | shares of the image's own width and height | shares of the padded square | the model's unit |
| RefCOCO prompt | `REFCOCO_LONG` + expression | `REFCOCO_SHORT` + expression | `LOCATE` |
| POPE, GQA prompt | question + `SHORT_ANSWER` | the same | the same |
| longest answer | RefCOCO 1024, POPE 128, GQA 16 tokens | 128 tokens | RefCOCO 512, else as lmms-eval |

- "lmms-eval" is what the Reroute paper's table was made with: `elmma/mllm-reroute` README.md (lmms-eval v0.7.1),
  configs/model/llava15_7b_hf.yaml (model `llava_hf`), configs/eval/paper_main.yaml (POPE, eight RefCOCO splits),
  scripts/run_eval.py (`MODEL_PRESETS`: LLaVA has the prompt "full" and boxes in 0..1). Nuwa's exp_bash/llava.sh
  (`Man-PaperRejected/Nuwa`) runs the same tasks with the model `llava`, which pads, while boxes are graded unpadded.
- Prompts, boxes and answer lengths: `EvolvingLMMs-Lab/lmms-eval`, lmms_eval/tasks/refcoco/utils_rec.py,
  tasks/pope/{pope.yaml,utils.py}, tasks/gqa/{gqa.yaml,utils.py}; models/simple/llava_hf.py has the 1024 where a task
  says nothing. v0.7.1 and 0.7.3 differ only in the dataset's owner (`lmms-lab`, then `lmms-lab-encoder`).
- "llava" is how the model was trained: `haotian-liu/LLaVA` scripts/v1_5/finetune.sh (`--image_aspect_ratio pad`),
  llava/mm_utils.py (`expand2square`, `process_images`: the colour is the processor's mean), docs/Evaluation.md
  (short answers), llava/eval/model_vqa_loader.py (128 tokens); boxes of the padded square: its issues 606 and 1833.
  LLaVA has no RefCOCO script of its own; the short prompt is the one of its training data (issue 623).
- "qwen" is the Reroute paper's for Qwen2.5-VL (scripts/run_eval.py: prompt "nuwa", boxes in pixels, for Qwen3-VL in
  thousandths; lmms_eval_patches/refcoco_utils_rec.patch), Nuwa's (Vscan/qwen/eval/test_refcoco_nuwa_s2_025.py, 512
  tokens) and that of Qwen's authors (`QwenLM/Qwen3-VL` issue 991). Nuwa's script takes a leading article away; the
  others do not, nor does this. Boxes: `reroute.evaluation.writing`, which also reads them under "lmms-eval".
"""  # noqa: E501  (a table)

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from reroute.errors import UserError, nearest
from reroute.evaluation.questions import Box

Protocol = Literal["lmms-eval", "llava", "qwen"]
PROTOCOLS: tuple[Protocol, ...] = ("lmms-eval", "llava", "qwen")

REFCOCO_SHORT = "Please provide the bounding box coordinate of the region this sentence describes: "
REFCOCO_LONG = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
) + REFCOCO_SHORT
LOCATE = "Locate {} in this image and output the bbox coordinates in JSON format."
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

# int(255 * mean) of CLIP's image processor, as LLaVA's process_images computes it.
PADDING = (122, 116, 104)

_FOUR = ",".join([r"\s*(-?\d+(?:\.\d+)?)"] * 4)
# Brackets anywhere win over parentheses, which the paper's patch of lmms-eval reads as well
# (`elmma/mllm-reroute` lmms_eval_patches/refcoco_utils_rec.patch).
_BOXES = (re.compile(rf"\[{_FOUR}\s*\]"), re.compile(rf"\({_FOUR}\s*\)"))


def check_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises UserError."""
    for protocol in PROTOCOLS:
        if name == protocol:
            return protocol
    raise UserError(f"there is no protocol {name!r}", hint=nearest(name, PROTOCOLS))


def read_box(answer: str) -> Box | None:
    """The first `[x1, y1, x2, y2]` or `(x1, y1, x2, y2)` of an answer, as written; None without one, which scores 0."""
    match = next(filter(None, (form.search(answer) for form in _BOXES)), None)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(part) for part in match.groups())
    return x1, y1, x2, y2


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What the model is shown: `width` x `height` pixels with the image's own corner at (`left`, `top`)."""

    width: int
    height: int
    left: int = 0
    top: int = 0

    @classmethod
    def of(cls, size: tuple[int, int], protocol: Protocol) -> Canvas:
        """The canvas of an image of (width, height) pixels."""
        width, height = size
        if protocol != "llava":
            return cls(width=width, height=height)
        side = max(size)
        return cls(width=side, height=side, left=(side - width) // 2, top=(side - height) // 2)

    def fractions(self, pixels: Box) -> Box:
        """A box in pixels of the image as shares 0..1 of the canvas."""
        x1, y1, x2, y2 = pixels
        across, down = (x1 + self.left, x2 + self.left), (y1 + self.top, y2 + self.top)
        return across[0] / self.width, down[0] / self.height, across[1] / self.width, down[1] / self.height

    def show(self, image: Image.Image) -> Image.Image:
        """The canvas with the image on it: RGB, without the file's EXIF rotation, which boxes know nothing of."""
        canvas = Image.new("RGB", (self.width, self.height), PADDING)
        canvas.paste(image.convert("RGB"), (self.left, self.top))
        return canvas
