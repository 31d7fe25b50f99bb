"""Workflows queued through the HTTP API of a ComfyUI that runs, with the pack as ``sloth-fx comfyui install`` puts it.

COMFYUI_PATH is a checkout of it; the Python that runs the tests runs it, too.
"""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sloth_fx.cli.app import app
from tests.integrations.comfy_real import ONLY_THERE, PATH

pytestmark = [*ONLY_THERE, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
ROWS, COLUMNS, BATCH = 208, 144, 2
TOYS = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.integrations.comfy_toys import NODE_CLASS_MAPPINGS\n"
TILE = {"tiling_max_depth": 2, "global_ratio": 0.5, "tile_size": 16}
NAG = {"scale": 5.0, "tau": 2.5, "alpha": 0.25, "norm": "l1", "start": 0.0, "stop": 1.0, "negative": ["toy", 2]}
HYPER_TILE = {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": True, "seed": 0}


class Server:
    def __init__(self, port):
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path):
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return answer.read()

    def json(self, path):
        return json.loads(self.get(path))

    def queue(self, prompt):
        """(status, outputs by node, messages) of a prompt that was run, or ("refused", errors by node, [])."""
        body = json.dumps({"prompt": prompt}).encode()
        request = urllib.request.Request(self.address + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            return "refused", json.load(error)["node_errors"], []
        for _ in range(600):
            history = self.json(f"/history/{number}")
            if number in history:
                done = history[number]
                return done["status"]["status_str"], done["outputs"], done["status"]["messages"]
            time.sleep(0.2)
        raise AssertionError("the prompt was not done in two minutes")

    def image(self, outputs, node="save"):
        """(images, rows, columns, 3), 0..255."""
        from PIL import Image

        query = map(urllib.parse.urlencode, outputs[node]["images"])
        pictures = [Image.open(io.BytesIO(self.get(f"/view?{each}"))) for each in query]
        return torch.stack([torch.tensor(list(each.getdata())).view(each.height, each.width, 3) for each in pictures])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """ComfyUI with a folder of its own for nodes and images."""
    base = tmp_path_factory.mktemp("ComfyUI")
    (base / "custom_nodes" / "toys").mkdir(parents=True)
    (base / "custom_nodes" / "toys" / "__init__.py").write_text(TOYS)
    (base / "pages").mkdir()
    (base / "pages" / "index.html").write_text("")
    assert CliRunner().invoke(app, ["comfyui", "install", str(base)]).exit_code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--cpu --listen 127.0.0.1 --port {port} --disable-auto-launch --disable-api-nodes --disable-metadata"
    folders = ["--base-directory", base, "--front-end-root", base / "pages"]
    path = os.pathsep.join([str(ROOT), *(each for each in sys.path if each and each != PATH)])
    with open(base / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "main.py", *options.split(), *map(str, folders)],
            cwd=PATH,
            env={**os.environ, "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        found = Server(port)
        for _ in range(360):
            assert process.poll() is None, (base / "log.txt").read_text()[-3000:]
            try:
                found.get("/system_stats")
                break
            except OSError:
                time.sleep(0.5)
        yield found
    finally:
        process.terminate()
        process.wait(30)


def chain(*nodes, model="unet", seed=5):
    """A prompt: the toy, our nodes (class and inputs) one after another, a sampler, and what saves its images."""
    prompt = {"toy": {"class_type": "ToyCheckpoint", "inputs": {"name": model}}}
    last = ["toy", 0]
    for number, (kind, inputs) in enumerate(nodes):
        prompt[f"node{number}"] = {"class_type": kind, "inputs": {"model": last, **inputs}}
        last = [f"node{number}", 0]
    size = {"width": COLUMNS, "height": ROWS, "batch_size": BATCH}
    how = {"seed": seed, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    texts = {"positive": ["toy", 1], "negative": ["toy", 2]}
    return prompt | {
        "empty": {"class_type": "EmptyLatentImage", "inputs": size},
        "sample": {
            "class_type": "KSampler",
            "inputs": {"model": last, "latent_image": ["empty", 0], **texts, **how},
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["toy", 3]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "toy"}},
    }


def cached(messages):
    return next(set(more["nodes"]) for name, more in messages if name == "execution_cached")


def test_images(server):
    """Of a chain of nodes: another image than without them, and no node is executed again for another seed."""
    nodes = ("NearSightedTile", TILE), ("SlothFXNAG", NAG)
    plain = server.image(server.queue(chain())[1])
    fewer = server.image(server.queue(chain(nodes[0]))[1])
    status, outputs, messages = server.queue(chain(*nodes))
    assert status == "success", messages
    found = server.image(outputs)
    assert found.shape == (BATCH, ROWS, COLUMNS, 3)
    for one, other in ((found, fewer), (fewer, plain)):
        assert (one - other).abs().float().mean() > 0.2
    status, outputs, messages = server.queue(chain(*nodes, seed=6))
    assert status == "success"
    assert {"toy", "node0", "node1"} <= cached(messages)
    assert not torch.equal(server.image(outputs), found)


def test_a_report(server):
    prompt = chain(("NearSightedTile", TILE)) | {
        "report": {"class_type": "SlothFXReport", "inputs": {"model": ["node0", 0]}}
    }
    status, outputs, _ = server.queue(prompt)
    assert status == "success"
    assert outputs["report"]["text"][0].startswith("UNetModel: 14 attention sites (7 self, 7 cross)")


SAVED = {  # by node, what a workflow holds of it: the values of its widgets, in their order
    "SlothfulAttentionSimple": [1, 1, "2D_AVG", 6, 0, "2D_AVG", 4, 0],
    "SlothfulAttention": [0.4, 2, "2D_AVG", 2, 6, 0, 0, "2D_AVG", 2, 4, 0, 0],
    "NearSightedTile": [2, 0.5, 16],
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_workflow_that_the_original_pack_saved(server, kind):
    """Its values become inputs as a browser makes them: in the order in which the server declares the widgets."""
    declared = server.json(f"/object_info/{kind}")[kind]
    assert declared["category"] == "SlothfulAttention"
    names = [name for name in declared["input_order"]["required"] if name != "model"]
    values = dict(zip(names, SAVED[kind], strict=True))
    status, outputs, messages = server.queue(chain((kind, values)))
    assert status == "success", messages
    assert not torch.equal(server.image(outputs), server.image(server.queue(chain())[1]))


RAISED = {
    "two tilings": (
        chain(("NearSightedTile", TILE), ("SlothFXHyperTile", HYPER_TILE)),
        "SlothFXHyperTile",
        "NearSightedTile and HyperTile both tile input_blocks.1.1.transformer_blocks.0.attn1",
    ),
    "no layer": (
        chain(("SlothFXTokenDownsample", {"factors": "2", "where": "nowhere"})),
        "SlothFXTokenDownsample",
        "where='nowhere' matches no site",
    ),
    "out of range in JSON": (
        chain(("SlothFXFromJSON", {"spec": '{"version": 1, "type": "PAG", "scale": -7}'})),
        "SlothFXFromJSON",
        "PAG: scale=-7 is refused",
    ),
    "no attention": (
        chain(("NearSightedTile", TILE), model="blind"),
        "KSampler",
        "Blind computes no attention: there is nothing to transform",
    ),
}


@pytest.mark.parametrize("case", RAISED)
def test_what_fails_is_an_error_of_a_node(server, case):
    prompt, node, words = RAISED[case]
    status, _, messages = server.queue(prompt)
    assert status == "error"
    error = next(more for name, more in messages if name == "execution_error")
    assert error["node_type"] == node
    assert error["exception_type"] == "sloth_fx.errors.SlothError"
    assert words in error["exception_message"]


def without(inputs, name):
    return {key: value for key, value in inputs.items() if key != name}


REFUSED = {
    "no negative": (chain(("SlothFXNAG", without(NAG, "negative"))), "required_input_missing", "negative"),
    "below": (chain(("NearSightedTile", {**TILE, "tile_size": 7})), "value_smaller_than_min", "tile_size"),
    "above": (chain(("SlothFXNAG", {**NAG, "scale": 1e9})), "value_bigger_than_max", "scale"),
    "no choice": (chain(("SlothFXNAG", {**NAG, "norm": "l7"})), "value_not_in_list", "norm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_comfyui_refuses(server, case):
    """By the ranges that the nodes declare, before anything is run."""
    prompt, kind, name = REFUSED[case]
    status, errors, _ = server.queue(prompt)
    assert status == "refused"
    assert [(each["type"], each["extra_info"]["input_name"]) for each in errors["node0"]["errors"]] == [(kind, name)]
