"""``where``: which attention sites a spec acts on. Random weights.

A stage, a depth range, a glob over the paths, several conditions at once, or a function of the site; and several specs
in one call, each with sites of its own.
"""

import argparse

import unets

import sloth_fx
from sloth_fx import NearSightedTile, SlothfulAttention

SELECTORS = {
    "every site": None,
    "a stage": "out",
    "a depth range": (1, 1),
    "a glob": "up_blocks.*.attn1",
    "several at once": {"stage": ["in", "out"], "path": "*attentions.0.*"},
    "a function": lambda site: site.q_tokens > 500 and site.heads >= 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet: seconds on a CPU")
    options = parser.parse_args()

    unet = unets.sd15(tiny=options.tiny)
    for title, where in SELECTORS.items():
        patched = sloth_fx.transform(unet, SlothfulAttention(keep_middle=False, where=where))
        chosen = [each.path for each in sloth_fx.report(patched) if each.operators]
        print(f"{title}: {where!r:.70}\n  {len(chosen)} sites, {chosen[0]} first")

    both = [NearSightedTile(tile_size=16, where="in"), SlothfulAttention(where="out")]
    print("\nTwo specs, one for each side:")
    print(sloth_fx.report(sloth_fx.transform(unet, both)))

    try:
        sloth_fx.transform(unet, SlothfulAttention(where="up_block.*"))
    except sloth_fx.SlothError as error:
        print(f"\nA slip is an error:\n{error}")


if __name__ == "__main__":
    main()
