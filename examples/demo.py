"""What does torchguard do for a real training script? A WGAN: silently wrong, refused, and put right."""

from __future__ import annotations

import sys
from typing import NoReturn

import _common
import torchguard
import wgan_digits


def headline(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def fail(line: str) -> NoReturn:
    sys.exit(f"demo failed: {line}")


def main() -> None:
    headline("1. weights clipped between forward and backward, plain PyTorch: no error, wrong gradients")
    unguarded: _common.Run = wgan_digits.main(["--mistake"])
    if not any(error.share > 0.01 for error in unguarded.gradient_errors):
        fail("the mistake was expected to make the gradients wrong")

    headline("2. the same script under torchguard.strict(): refused, at the line that does it")
    try:
        wgan_digits.main(["--mistake", "--guard", "strict"])
    except torchguard.SavedTensorCorruptionError as error:
        print(f"{type(error).__name__}: {error.violation.render(color=sys.stdout.isatty())}")
    else:
        fail("strict() let the mistake through")

    headline("3. weights clipped after the update, plain PyTorch")
    plain = wgan_digits.main([])

    headline("4. the same script under torchguard.strict(): silent, and the same losses to the last bit")
    guarded = wgan_digits.main(["--guard", "strict"])
    if guarded.digest != plain.digest:
        fail("the losses under strict() are not those without it")
    print("\nthe losses of 3 and 4 are the same to the last bit")


if __name__ == "__main__":
    main()
