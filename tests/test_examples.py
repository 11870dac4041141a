"""The examples' claims about numbers, without their timing, and the README's own example."""

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastnn

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.append(str(CHECKOUT / "examples"))


def test_the_readme_does_what_it_says() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    assert blocks
    with fastnn.trace() as calls:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {})
    assert any(call.op == "linear" and "gelu" in call.options for call in calls), "the fused kernel is not fused"


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The demo with digits alone, made-up times and losses, and a report in a folder of its own."""
    import demo

    def untimed(result: demo.Result, work: str, calls: dict[str, Any], seconds: float) -> None:
        result.times[work] = {name: demo.Times.of([1e-3 * (n + 1)]) for n, name in enumerate(calls)}

    def absent(step: Any) -> demo.Result:
        raise ModuleNotFoundError("no voices here")

    monkeypatch.setattr(demo.Result, "time", untimed)
    monkeypatch.setattr(demo, "REPORT", tmp_path / "report")
    monkeypatch.setattr(demo, "run_sentences", lambda step: demo.Result("sentences", fastnn.replace(torch.nn.Bilinear(1, 1, 1))))
    monkeypatch.setattr(demo, "run_voices", absent)
    monkeypatch.setattr(demo.crepe, "SIZES", ())
    monkeypatch.setattr(demo, "NETWORKS", {"autoencoder": (10, -9.0)})
    return demo


@pytest.mark.parametrize("accuracy", [0.98, 0.5])
def test_the_demo_reports(short_demo: Any, accuracy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit status says whether the numbers hold; the page and the plot are there in either case."""
    monkeypatch.setattr(short_demo.digits, "train", lambda model, data: [1 / n for n in range(1, 60)])
    monkeypatch.setattr(short_demo.digits, "accuracy", lambda model, data: accuracy)
    assert short_demo.main() == (accuracy < 0.97)
    page = (short_demo.REPORT / "demo.md").read_text()
    assert ("FAILS" in page) == (accuracy < 0.97)
    assert "digits: 5 epochs of training" in page
    assert "digits MLP: replaced Linear × 3, " in page
    assert "left Bilinear (no fastnn kernel for Bilinear)" in page
    assert "Left out: no voices here" in page
    assert "autoencoder: 10 steps of training" in page
    assert re.search(r"loss curves apart, first 10 steps in float64 .* ≤ 1e-09 .*holds", page)
    for picture in ("cnn.png", "denoised.png"):
        assert f"]({picture})" in page
        assert (short_demo.REPORT / picture).read_bytes().startswith(b"\x89PNG")
    assert (short_demo.REPORT / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_digits_train_alike() -> None:
    import digits

    data = digits.digits()
    theirs = digits.classifier()
    ours = copy.deepcopy(theirs)
    report = fastnn.replace(ours)
    assert len(report.replaced) >= 6  # three linear layers, two activations, the loss
    with fastnn.trace() as calls:
        digits.accuracy(ours, data)
    assert any(call.backend == "cpu" for call in calls)

    expected, losses = digits.train(theirs, data), digits.train(ours, data)
    torch.testing.assert_close(losses[:50], expected[:50], rtol=0, atol=1e-4)
    assert losses != expected, "the same bits throughout: nothing was replaced"
    assert digits.accuracy(ours, data) >= 0.97
    assert digits.accuracy(theirs, data) >= 0.97


def test_sentence_embeddings_stay() -> None:
    import embeddings

    model, tokens = embeddings.embedder()
    assert len(tokens["input_ids"]) >= 64
    replaced = copy.deepcopy(model)
    report = fastnn.replace(replaced)
    assert len(report.replaced) >= 36  # the linear layers
    with fastnn.trace() as calls:
        got = embeddings.embed(replaced, tokens)
    served = {call.op for call in calls if call.backend == "cpu"}
    assert served >= {"linear", "layer_norm", "attention", "activation", "embedding"}, served
    expected = embeddings.embed(model, tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not torch.equal(got, expected), "the same bits throughout: nothing was replaced"
    assert all("family" in text for _, text in embeddings.search(replaced, "What is said of happy families?", 2))
    # The numbers mean something: the two sentences on happy families are each other's nearest.
    alike = (got @ got.T).fill_diagonal_(0)
    first, second = (i for i, s in enumerate(embeddings.sentences()) if "happy families" in s.lower())
    assert alike[first].argmax() == second
    assert alike[second].argmax() == first


@pytest.mark.parametrize("name", ["lenet", "resnet", "mobilenet", "autoencoder"])
def test_convolutional_networks_train_alike(name: str) -> None:
    import cnn
    import digits

    found = digits.digits()  # in float64: in float32 these networks part any two roundings after a few steps
    data = digits.Digits(found.train_x.double(), found.train_y, found.test_x.double(), found.test_y)
    with fastnn.backend("cpu"):
        mine = cnn.train(name, cnn.make(name, "fastnn").double(), data, 10, batch=32)
    theirs = cnn.train(name, cnn.make(name, "torch").double(), data, 10, batch=32)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    assert mine != theirs, "the same bits throughout: nothing was replaced"
    assert mine[-1] < mine[0]


def test_a_denoised_picture_is_drawn(tmp_path: Path) -> None:
    import cnn
    import digits

    data = digits.digits()
    cnn.train("autoencoder", model := cnn.make("autoencoder", "fastnn"), data, 150)
    assert cnn.score("autoencoder", model, data) > 0.4
    cnn.draw(model, data, tmp_path / "denoised.png")
    assert (tmp_path / "denoised.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("size", "every", "share"), [("tiny", 1, 0.7), ("full", 6, 0.8)])
def test_pitch_stays(size: str, every: int, share: float) -> None:
    """Known pitches: the same track as torch's to a cent, and the truth to ten, in the median and mostly."""
    import crepe

    try:
        model = crepe.crepe(size)
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    served = crepe.ours(model)
    found = [m.padding for m in served.modules() if isinstance(m, torch.nn.Conv2d)]
    assert found == [(254, 0), *["same"] * 5], "zeros that the model adds by itself are convolutions' paddings"
    assert "pad(" not in served.code  # type: ignore[operator]
    with torch.inference_mode():
        for audio, pitch in crepe.signals().values():
            x, true = crepe.frames(audio)[::every], crepe.truth(pitch)[::every]
            expected, got = model(x), served(x)
            assert not torch.equal(expected, got), "the same bits: nothing was replaced"
            assert (crepe.cents(got) - crepe.cents(expected)).abs().max() <= 1
            off = (crepe.cents(got) - true).abs()
            assert off.median() <= 10
            assert (off <= 10).float().mean() >= share
            theirs = (crepe.cents(expected) - true).abs()
            assert abs((off <= 10).sum() - (theirs <= 10).sum()) <= 1, "as many windows as torch"


def test_voices_are_known_after_replace() -> None:
    import voices

    try:
        model = voices.encoder()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    parts = voices.utterances()
    ours = copy.deepcopy(model)
    assert [e.class_name for e in fastnn.replace(ours, backend="cpu").replaced] == ["LSTM", "Linear", "ReLU"]
    expected, found = voices.embed(model, parts), voices.embed(ours, parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.equal(found, expected), "the same bits throughout: nothing was replaced"
    # The numbers mean something: each voice is most like itself, saying something else.
    nearest = (found @ found.T).fill_diagonal_(0).argmax(1)
    assert nearest.tolist() == torch.arange(len(found)).roll(len(found) // 2).tolist()


def test_recurrent_models_train_alike() -> None:
    import rnn

    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 11, (6, 8, 21), generator=generator)
    for name, kind in rnn.TRAINED.items():
        torch.manual_seed(0)
        theirs = rnn.Model(kind, 11, 24)
        ours = copy.deepcopy(theirs)
        fastnn.replace(ours)
        theirs.layer.backend = "torch"
        found = []
        for model in (theirs, ours):
            batches = ((rows[:, :-1], rows[:, 1:]) for rows in data)
            losses, _ = rnn.train(model, batches, lambda out, y: torch.nn.functional.cross_entropy(out.mT, y))
            found.append(losses)
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4, msg=name)


def test_numbers_are_spelled() -> None:
    import transformer

    assert " ".join(transformer.spell(1042)) == "one thousand and forty two"
    assert " ".join(transformer.spell(9915)) == "nine thousand nine hundred and fifteen"
    assert [" ".join(transformer.spell(n)) for n in (0, 19, 20, 100)] == ["zero", "nineteen", "twenty", "one hundred"]
    assert max(len(transformer.spell(n)) for n in range(10_000)) <= transformer.LONGEST


def test_translators_train_alike_and_search_by_beams() -> None:
    import itertools

    import transformer

    curves, found = {}, {}
    for who, model in transformer.both(transformer.Translator):
        with fastnn.trace() as calls:
            batches = itertools.islice(transformer.number_batches(), 12)
            curves[who] = transformer.train(model, batches, transformer.word_loss)[0]
            found[who] = transformer.beam_search(model.eval(), transformer.spelled([1042])[0])
        assert ("attention" in {call.op for call in calls if call.backend == "cpu"}) == (who == "fastnn")
    torch.testing.assert_close(curves["fastnn"], curves["torch"], rtol=0, atol=1e-4)
    assert curves["fastnn"] != curves["torch"], "the same bits throughout: nothing was replaced"
    assert curves["torch"][-1] < curves["torch"][0]
    assert found["fastnn"] == found["torch"]


def test_one_beam_is_greedy_and_more_are_no_less_likely() -> None:
    """On a model that was not trained, against whole passes without a cache."""
    import transformer

    torch.manual_seed(3)
    model = transformer.Translator(16, 2, 1).eval()
    source = transformer.spelled([42])[0]
    memory = model.encode(source)

    def likelihood(words: list[str]) -> float:
        written = torch.tensor([[transformer.END, *(transformer.WORDS.index(word) for word in words), transformer.END]])
        steps = written[:, : transformer.LONGEST + 2]  # one that did not end
        each = model.decoder(steps[:, :-1], memory).log_softmax(2).gather(2, steps[:, 1:, None])
        return float(each.sum())

    with torch.no_grad():
        written = torch.full((1, 1), transformer.END)
        for _ in range(transformer.LONGEST + 1):
            word = model.decoder(written, memory)[:, -1:].argmax(2)
            written = torch.cat([written, word], 1)
            if word == transformer.END:
                break
        greedy = transformer.beam_search(model, source, beams=1)
        assert greedy == [transformer.WORDS[n] for n in written[0, 1:].tolist() if n != transformer.END]
        assert likelihood(transformer.beam_search(model, source, beams=8)) >= likelihood(greedy) - 1e-5


def test_a_gpt_writes_the_same_with_and_without_its_cache() -> None:
    import transformer

    data, alphabet = transformer.manual()
    torch.manual_seed(0)
    model = transformer.Decoder(len(alphabet), 96, 48, 3, 2).eval()
    expected = transformer.generate(model, data[None, :20], 40, cached=False)
    fastnn.replace(model)
    with fastnn.use():
        for cached in (True, False):
            speed, written = transformer.timed(model, data[None, :20], 40, cached)
            assert speed > 0
            assert torch.equal(written, expected)
    assert expected.shape == (1, 60)


@pytest.mark.parametrize("convolutions", [False, True])
def test_digits_are_seen_alike(convolutions: bool, tmp_path: Path) -> None:
    import itertools

    import digits
    import transformer

    data = digits.digits()
    curves = {}
    for who, model in transformer.both(lambda: transformer.Vision(convolutions)):
        batches = itertools.islice(transformer.digit_batches(data), 15)
        curves[who] = transformer.train(model, batches, torch.nn.functional.cross_entropy)[0]
        seen = model.eval().looks_at(data.test_x[:3])
        torch.testing.assert_close(seen.sum((1, 2)) <= 1, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(curves["fastnn"], curves["torch"], rtol=0, atol=1e-3)
    assert curves["fastnn"] != curves["torch"], "the same bits throughout: nothing was replaced"
    transformer.draw(model, data, tmp_path / "seen.png")
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
