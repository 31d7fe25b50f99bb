"""``sloth-fx inspect``."""

import json

import sloth_fx
from tests.models import shared


def test_json_is_the_report(run, pipeline):
    done = run("inspect", pipeline, "--json")
    assert done.code == 0
    assert json.loads(done.out) == sloth_fx.inspect(shared("two_levels")).to_dict()


def test_text_has_a_line_for_each_site(run, pipeline):
    done = run("inspect", pipeline)
    report = sloth_fx.inspect(shared("two_levels"))
    lines = [line for line in done.out.splitlines() if "attn" in line]
    assert done.out.startswith(f"UNet2DConditionModel: {len(report)} attention sites (")
    assert [line.split()[0] for line in lines] == [site.name for site in report]
    assert [line.split()[5] for line in lines] == [str(site.q_tokens) for site in report]
    assert "\x1b" not in done.out
