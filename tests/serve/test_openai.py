"""The official SDK against a live server: every call, every parameter."""

from __future__ import annotations

import base64
import io

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

SMALL = {"size": "128x64"}


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)


def png(size=(64, 32), colour="orange", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def opened(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_generate(client):
    answer = client.images.generate(prompt="a sign", model="nano", n=2, **SMALL, extra_body={"seed": 7, "steps": 5})
    images = [opened(one.b64_json) for one in answer.data]
    assert [image.size for image in images] == [(128, 64)] * 2
    assert [image.getpixel((0, 0))[0] for image in images] == [7, 8]
    assert (answer.size, answer.output_format, answer.quality, answer.background) == ("128x64", "png", "auto", "opaque")
    assert answer.usage.output_tokens == 2 * 128 * 64 // 256
    assert (answer.model_extra["seed"], answer.model_extra["steps"]) == (7, 5)


def test_every_parameter_is_taken(client):
    answer = client.images.generate(
        prompt="a sign",
        model="gpt-image-2",  # what clients send by default means our default
        background="opaque",
        moderation="low",
        n=1,
        output_compression=70,
        output_format="webp",
        quality="low",
        size="auto",
        style="vivid",
        user="somebody",
        safety_identifier="somebody",
        extra_body={"negative_prompt": "blur", "guidance_scale": 2.5, "lora": {"ink": 0.4}, "steps": 4},
    )
    assert opened(answer.data[0].b64_json).format == "WEBP"
    extra = answer.model_extra
    assert (extra["negative_prompt"], extra["guidance_scale"], extra["lora"]["ink"]) == ("blur", 2.5, 0.4)
    assert (extra["model"], answer.quality) == ("nano", "low")


def test_addresses_of_pictures_work_once_signed(client):
    answer = client.images.generate(prompt="a sign", response_format="url", output_format="jpeg", **SMALL)
    got = httpx.get(answer.data[0].url)
    assert got.status_code == 200 and Image.open(io.BytesIO(got.content)).format == "JPEG"
    how = {"prompt": "a sign", "response_format": "url", "output_format": "jpeg", **SMALL, "extra_body": {"seed": 7}}
    poor, good = (httpx.get(client.images.generate(output_compression=q, **how).data[0].url).content for q in (1, 99))
    tables = [Image.open(io.BytesIO(data)).quantization[0] for data in (poor, good)]  # type: ignore[attr-defined]
    assert sum(tables[0]) > 10 * sum(tables[1])


def test_stream_brings_real_partial_images(client):
    events = list(
        client.images.generate(prompt="a sign", stream=True, partial_images=2, **SMALL, extra_body={"steps": 9})
    )
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == [0, 1]
    reds = [opened(event.b64_json).getpixel((0, 0))[0] for event in partial]  # the fake's previews count steps
    assert [opened(event.b64_json).size for event in partial] == [(128, 64)] * 2 and reds[0] < reds[1] < 12
    assert events[-1].type == "image_generation.completed" and events[-1].usage.total_tokens > 0
    assert len(events) == 3


def test_stream_of_several_pictures_completes_each(client):
    events = list(client.images.generate(prompt="a sign", stream=True, n=2, **SMALL))
    assert [event.type for event in events] == ["image_generation.completed"] * 2


def test_a_failure_in_a_stream(client):
    with pytest.raises(openai.APIError, match="can't be drawn"):
        list(client.images.generate(prompt="sorry", stream=True, partial_images=1))


def test_edit_with_one_picture_several_and_a_mask(client):
    one = client.images.edit(image=png(), prompt="make it red", extra_body={"seed": 5})
    assert opened(one.data[0].b64_json).getpixel((0, 0)) == (5, 10, 1)
    two = client.images.edit(image=[png(), ("b.png", png(), "image/png")], prompt="together", size="64x32")
    assert opened(two.data[0].b64_json).getpixel((0, 0))[2] == 2
    clear = Image.new("RGBA", (64, 32), "black")
    clear.paste((0, 0, 0, 0), (0, 0, 32, 32))
    buffer = io.BytesIO()
    clear.save(buffer, format="PNG")
    hole = client.images.edit(
        image=png(), mask=buffer.getvalue(), prompt="a door", quality="high", input_fidelity="low"
    )
    inked = client.images.edit(image=png(), prompt="red", extra_body={"lora": {"ink": 0.4}})
    assert inked.model_extra["lora"]["ink"] == 0.4  # the client sends lora[ink]=0.4
    job = hole.model_extra["job"]
    assert (
        httpx.get(str(client.base_url).replace("/v1/", f"/api/jobs/{job}")).json()["recipes"][0]["task"]
        == "edit_inpaint"
    )


def test_edit_streams(client):
    events = list(client.images.edit(image=png(), prompt="x", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_edit_as_json(server):
    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    for body in ({"image": data}, {"image": [data]}, {"images": [{"image_url": data}]}):
        answer = server.post("/v1/images/edits", {"prompt": "red", **body})
        assert answer.status_code == 200, answer.text
    assert server.post("/v1/images/edits", {"prompt": "red"}).json()["error"]["message"].startswith("image is missing")


def test_variations(client):
    with pytest.warns(DeprecationWarning):
        answer = client.images.create_variation(image=png(), n=2, size="64x32")  # type: ignore[arg-type]
    assert len(answer.data) == 2


def test_models(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "lanting"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nona")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("what", "kind", "word"),
    [
        ({"prompt": ""}, openai.BadRequestError, "empty"),
        ({"prompt": "x", "size": "100x100"}, openai.BadRequestError, "multiples of 16"),
        ({"prompt": "x", "n": 17}, openai.BadRequestError, "at most 16"),
        ({"prompt": "x", "model": "nona"}, openai.NotFoundError, "nona"),
        ({"prompt": "x", "background": "transparent"}, openai.BadRequestError, "transparent"),
        ({"prompt": "x", "output_format": "svg"}, openai.BadRequestError, "png, jpeg or webp"),
        ({"prompt": "x", "extra_body": {"frame_count": 4}}, openai.BadRequestError, "frame_count"),
        ({"prompt": "x", "extra_body": {"lora": "ink:much"}}, openai.BadRequestError, "no number"),
        ({"prompt": "boom"}, openai.InternalServerError, "went wrong inside"),
        ({"prompt": "sorry"}, openai.BadRequestError, "say it differently"),
    ],
)
def test_errors_are_in_their_shape(client, what, kind, word):
    with pytest.raises(kind, match=word) as error:
        client.images.generate(**what)
    assert error.value.code and error.value.type


def test_a_client_that_leaves_cancels_its_job(server, client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(prompt="slow leaver", extra_body={"steps": 150})
    found = server.get("/api/jobs", params={"search": "leaver"}).json()["jobs"][0]
    assert server.ended(found["id"])["state"] == "cancelled"


def test_a_stream_that_is_left_cancels_its_job(server, client):
    stream = client.images.generate(prompt="slow stream", stream=True, partial_images=3, extra_body={"steps": 40})
    next(iter(stream))
    stream.close()
    found = server.get("/api/jobs", params={"search": "slow stream"}).json()["jobs"][0]
    assert server.ended(found["id"])["state"] == "cancelled"


def test_with_an_idempotency_key_it_can_come_back(server, client):
    how = {"prompt": "slow return", "extra_body": {"steps": 20}, "extra_headers": {"Idempotency-Key": "back"}}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.4).images.generate(**how)
    assert client.images.generate(**how).data[0].b64_json
    assert len(server.get("/api/jobs", params={"search": "slow return"}).json()["jobs"]) == 1
