"""Reports: every site, plain data, a table."""

import json

import pytest

import sloth_fx
from tests import models


def test_report_of_a_patched_model_says_what_was_done_and_why_not():
    model = sloth_fx.transform(models.shared("sd15"), sloth_fx.SlothfulAttention(where="in"))
    report = sloth_fx.report(model)
    sites = report.to_dict()["sites"]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    keys = ["path", "call", "kind", "stage", "depth", "heads", "head_dim", "q_tokens", "kv_tokens", "grid", "text"]
    keys += ["operators", "note"]
    assert all(list(site) == keys for site in sites)
    assert len(report) == len(list(report)) == len(sites)
    for site in sites:
        if site["kind"] == "cross":
            assert site["operators"] == []
            assert site["note"] == "cross-attention"
            assert site["text"] == [0, site["kv_tokens"]]
        elif site["stage"] == "in":
            assert site["operators"] == ["SlothfulAttention"]
            assert site["note"] == "keys and values reduced above to_k, to_v"
            assert site["text"] is None
        else:
            assert site["operators"] == []
            assert site["note"] == "not selected by where"


def test_middle_block_is_kept_and_said_so():
    report = sloth_fx.report(sloth_fx.transform(models.shared("sd15"), sloth_fx.SlothfulAttention()))
    (site,) = [each for each in report if each.stage == "middle" and each.kind == "self"]
    assert site.note == "middle block, kept (keep_middle)"


def test_table_has_a_row_for_each_site():
    report = sloth_fx.inspect(models.shared("sdxl"))
    text = str(report)
    assert text.splitlines()[0].startswith(f"UNet2DConditionModel: {len(report)} attention sites")
    assert all(site.path in text for site in report)


def test_graph_is_the_rewritten_one():
    model = sloth_fx.transform(models.shared("sd15"), sloth_fx.SlothfulAttention())
    path = next(site.path for site in sloth_fx.report(model) if site.operators)
    graph = sloth_fx.graph(model, path)
    graph.lint()
    assert "sloth_reduce_0" in [node.target for node in graph.nodes]
    with pytest.raises(sloth_fx.SlothError, match="nothing was rewritten at 'mid_block'; nearest: "):
        sloth_fx.graph(model, "mid_block")


def test_a_transform_without_inputs_reports_nothing_until_its_first_call():
    import torch

    model = sloth_fx.transform(torch.nn.Sequential(models.shared("unconditional")), sloth_fx.SlothfulAttention())
    report = sloth_fx.report(model)
    assert len(report) == 0
    assert "first call" in str(report)
