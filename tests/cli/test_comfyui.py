"""Installing the node pack, and removing it."""

import importlib.util

import pytest

from sloth_fx.integrations import comfyui


@pytest.fixture
def comfy(tmp_path):
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    return tmp_path / "ComfyUI"


def loaded(folder):
    """The pack as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location("custom_nodes.sloth_fx", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_install_and_uninstall(run, comfy):
    done = run("comfyui", "install", comfy)
    folder = comfy / "custom_nodes" / "sloth_fx"
    assert done.code == 0
    assert str(folder) in done.out
    assert len((folder / "__init__.py").read_text().splitlines()) == 3
    assert loaded(folder).NODE_CLASS_MAPPINGS is comfyui.NODE_CLASS_MAPPINGS
    assert loaded(folder).NODE_DISPLAY_NAME_MAPPINGS is comfyui.NODE_DISPLAY_NAME_MAPPINGS
    assert run("comfyui", "install", comfy).code == 0  # again: an update
    assert run("comfyui", "uninstall", comfy).code == 0
    assert list((comfy / "custom_nodes").iterdir()) == []


def test_nothing_of_others_is_touched(run, comfy):
    folder = comfy / "custom_nodes" / "sloth_fx"
    run("comfyui", "install", comfy)
    (folder / "mine.txt").write_text("mine")
    assert run("comfyui", "uninstall", comfy).code == 0
    assert [each.name for each in folder.iterdir()] == ["mine.txt"]
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
    for command in ("install", "uninstall"):
        done = run("comfyui", command, comfy)
        assert done.code == 1
        assert "another one's" in done.words
    assert (folder / "__init__.py").read_text() == "NODE_CLASS_MAPPINGS = {}"


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_the_wrong_folder(run, comfy, command):
    done = run("comfyui", command, comfy / "custom_nodes")
    assert done.code == 1
    assert "is no folder of ComfyUI: it has no custom_nodes; give the folder above" in done.words


def test_nothing_to_remove(run, comfy):
    done = run("comfyui", "uninstall", comfy)
    assert done.code == 1
    assert "nothing to remove" in done.words
