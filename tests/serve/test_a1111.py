"""webuiapi, the client most bots use, against a live server."""

from __future__ import annotations

import threading

import pytest
import webuiapi
from fakeserve import wait_for
from PIL import Image

SCHEDULER = "automatic"


@pytest.fixture(scope="module")
def client(server):
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="Euler", scheduler=SCHEDULER, steps=5)


def test_txt2img(client):
    result = client.txt2img(
        prompt="a sign <lora:ink:0.3>", negative_prompt="blur", seed=11, width=64, height=32, cfg_scale=3, batch_size=2
    )
    assert [image.size for image in result.images] == [(64, 32)] * 2
    assert [image.getpixel((0, 0))[0] for image in result.images] == [11, 12]
    assert result.info["all_seeds"] == [11, 12] and "ink:0.3" in result.info["infotexts"][0]
    assert result.info["prompt"] == "a sign" and result.parameters["cfg_scale"] == 3


def test_a_random_seed_and_iterations(client):
    result = client.txt2img(prompt="a sign", width=64, height=32, n_iter=2, batch_size=1)
    assert len(result.images) == 2 and result.info["seed"] >= 0


def test_img2img_with_and_without_mask(client, server):
    picture, mask = Image.new("RGB", (64, 32), "orange"), Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 32, 32))
    varied = client.img2img(images=[picture], prompt="a sign", denoising_strength=0.7, width=64, height=32)
    assert varied.image.size == (64, 32)
    client.img2img(images=[picture], prompt="a door", mask_image=mask, inpainting_fill=1, width=64, height=32)
    jobs = server.get("/api/jobs", params={"limit": 2}).json()["jobs"]
    assert [job["recipes"][0]["task"] for job in jobs] == ["inpaint", "image_to_image"]
    assert jobs[1]["recipes"][0]["request"]["strength"] == 0.7


def test_progress_and_interrupt(client, server):
    """What is drawn ends, with all its pictures, and the client's next request begins, as with A1111; one that waits
    behind somebody else's ends as well: it was drawn, whatever its client had said."""
    failed, drawn = [], []

    def draw(prompt: str, steps: int) -> None:
        try:
            drawn.append(client.txt2img(prompt=prompt, steps=steps, n_iter=2, width=64, height=32))
        except RuntimeError as error:
            failed.append(str(error))

    assert client.get_progress()["progress"] == 0
    thread = threading.Thread(target=draw, args=("slow", 100))
    thread.start()
    told = wait_for(lambda: found if (found := client.get_progress())["state"]["sampling_step"] > 2 else None)
    assert 0 < told["progress"] < 1 and told["state"]["sampling_steps"] == 100
    assert told["current_image"].startswith("iVBOR")
    after = threading.Thread(target=draw, args=("after", 2))
    after.start()
    wait_for(lambda: server.get("/api/models").json()["waiting"])
    client.interrupt()
    thread.join(10)
    after.join(10)
    assert len(failed) == 1 and "409" in failed[0] and len(drawn) == 1

    other = server.submit("slow", steps=100)["id"]
    wait_for(lambda: server.get(f"/api/jobs/{other}").json()["state"] == "running")
    behind = threading.Thread(target=draw, args=("behind", 2))
    behind.start()
    wait_for(lambda: server.get("/api/models").json()["waiting"])
    client.interrupt()
    behind.join(5)
    assert len(failed) == 2 and server.get(f"/api/jobs/{other}").json()["state"] == "running"
    server.post(f"/api/jobs/{other}/cancel")


def test_what_menus_are_filled_with(client):
    assert client.util_get_model_names() == ["nano"]
    assert client.util_get_current_model() == "nano"
    client.util_set_model("nano")
    assert [one["name"] for one in client.get_loras()] == ["ink", "fox"]
    assert client.util_get_sampler_names() == ["Euler"] and client.util_get_scheduler_names() == [SCHEDULER]
    for ask in ("sd_vae", "upscalers", "latent_upscale_modes", "hypernetworks", "face_restorers", "prompt_styles"):
        assert getattr(client, f"get_{ask}")() == []
    assert client.get_cmd_flags() == {} and "ram" in client.get_memory()
    assert client.get_embeddings()["loaded"] == {} and client.refresh_checkpoints() == {}
    assert client.get_options()["sd_model_checkpoint"] == "nano" and client.skip() == {}


def test_png_info(client, server):
    drawn = client.txt2img(prompt="a sign", seed=4, width=64, height=32).image
    drawn.info = {}
    assert client.png_info(drawn).info == ""
    raw = server.post("/sdapi/v1/txt2img", {"prompt": "a sign", "seed": 4}).json()["images"][0]
    told = server.post("/sdapi/v1/png-info", {"image": raw}).json()
    assert "Seed: 4" in told["info"] and told["items"]["lanting"].startswith("{")


def test_errors(client, server):
    with pytest.raises(RuntimeError, match="multiples of 16"):
        client.txt2img(prompt="a sign", width=100, height=100)
    answer = server.post("/sdapi/v1/txt2img", {"prompt": "x", "override_settings": {"sd_model_checkpoint": "nona"}})
    assert answer.status_code == 404 and "nona" in answer.json()["detail"]
    assert server.post("/sdapi/v1/img2img", {"prompt": "x"}).status_code == 400
    assert server.post("/sdapi/v1/options", {"sd_model_checkpoint": "/etc/passwd"}).status_code == 404
