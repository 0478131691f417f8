"""Decoding against the published rules: every id, how many were allowed, and the scores; with the cache and without."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import synthetic_tensor
from lm_small import extended_tokenizer, golden_lines
from lm_small import write_model as write_lm
from PIL import Image
from unitoken_small import IMAGES, LLM, VISION, golden, small_model

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.sequences import as_it_is
from pre_tokenize.text import TextTokenizer
from training.data.anyres import image_input
from training.data.loading import ImageReader
from training.data.packing import interleave, pack
from training.generation.cache import CachedLM, CachedUniToken, Recomputing
from training.generation.decode import Decoder, Prompt, Settings
from training.generation.grammar import ChameleonRules, DualViTokRules, Grammar, Kind
from training.generation.interpreter import LMInterpreter, UniTokenInterpreter, Wishes
from training.generation.sampling import Sampling, guide, restrict
from training.models.causal_lm import load_causal_lm
from vision_tokenizer.images.chameleon import crop_sizes
from vision_tokenizer.models.chameleon.vqgan import load_chameleon
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.models.dualvitok.vocabulary import DualViTokVocabulary, added_names
from vistoken.jobs.chunks import Item

GREEDY = golden("generation/unitoken_greedy.json")
CASES = {case["name"]: case for case in GREEDY["cases"]}
SQUARE = golden("chameleon_small/expected_tokens.json")["square"]


@pytest.fixture(scope="module")
def model():
    return CachedUniToken(small_model())


@pytest.fixture(scope="module")
def chameleon(chameleon_folder):
    return ChameleonFormat(TextTokenizer(chameleon_folder))


class Recorded:
    """A model that keeps what its session says."""

    def __init__(self, model):
        self._model, self.steps = model, []
        self.vocab_size, self.device, self.embed = model.vocab_size, model.device, model.embed

    def session(self, rows, room=0):
        self._session = self._model.session(rows, room)
        self.forget = self._session.forget
        return self

    def extend(self, inputs):
        logits = self._session.extend(inputs)
        self.steps.append(dict(zip(inputs, logits.clone(), strict=True)))
        return logits


def prompt_inputs(model, item, image=None, variant=None, turn=0):
    """Embeddings of an item's tokens up to its first label."""
    labels = np.array(SQUARE[str(item)]["label"])
    ids = np.array(SQUARE[str(item)]["token"])[: np.flatnonzero(labels >= 0)[0]]
    if image is None:
        return model.embed(ids)
    opened = Image.open(IMAGES / image).convert("RGB")
    tiles = image_input(opened, VISION.image_size, VISION.grid, variant == "anyres")
    sample = interleave("", ids, np.full(len(ids), -100), [tiles])
    with torch.no_grad():
        return model.model.embed(pack([sample], VISION.image_size))


def start_of(case):
    """What the answer begins with; where the size is forced later, it is forced at once here."""
    return tuple(case["answer_start"]) + ((8820, 8820) if case["answer_start"] == [8197] else ())


def settings_of(case):
    text = GREEDY["caption_published_text_top_k"] if "published" in case["name"] else GREEDY["text_top_k"]
    if case["name"] == "text" or case["name"].endswith("text_only"):
        text = 0
    return Settings(Sampling(top_k=text), (Sampling(top_k=GREEDY["image_top_k"]),), case["guidance"], greedy=True)


def rules_of(case, chameleon):
    text_only = case["name"] == "text" or case["name"].endswith("text_only")
    return ChameleonRules(chameleon, LLM.vocab_size, barred=text_only), not text_only


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_are_the_published_ones(model, chameleon, name):
    case = CASES[name]
    rules, images = rules_of(case, chameleon)
    start, after = start_of(case), case.get("after_image_published", [])
    expected = [*start, *case["tokens"][len(start) - len(case["answer_start"]) :], *after]
    settings = settings_of(case)
    recorded = Recorded(model)
    inputs = prompt_inputs(model, case["item"], case["image"], case["variant"])
    prompt = Prompt(inputs, np.random.default_rng(0), start, images, limit=len(expected))
    [answer] = Decoder(recorded, rules, settings).answer([prompt])
    assert answer.tokens == expected

    grammar, kinds = Grammar(rules), []
    for token in expected:
        kinds.append(grammar.next())
        grammar.push(token)
    forced_early = len(start) - len(case["answer_start"])
    for step in case["steps"]:
        kind = kinds[len(case["answer_start"]) + step["step"]]
        if step["step"] < forced_early or isinstance(kind, int):
            assert step["allowed"] == 1
            continue
        logits = recorded.steps[step["step"] - forced_early]
        scores = guide(logits[0], logits[1], case["guidance"]) if 1 in logits else logits[0]
        allowed = torch.from_numpy(rules.allowed(kind, images=images))
        scores = restrict(scores[None], allowed[None], [settings.sampling(kind)])[0]
        assert int(scores.isfinite().sum()) == step["allowed"]
        best = scores.topk(3)
        assert best.indices.tolist() == step["top_ids"]
        np.testing.assert_allclose(best.values, step["top_scores"], atol=2e-5)


@pytest.mark.parametrize("name", ["t2i_64x96_guidance3", "edit_base_64x64_guidance3", "edit_anyres_64x64_guidance3"])
def test_cached_answers_are_those_of_full_forward_passes(model, chameleon, name):
    case = CASES[name]
    rules, images = rules_of(case, chameleon)
    said = {}
    for kind in (model, Recomputing(model)):
        recorded = Recorded(kind)
        inputs = prompt_inputs(model, case["item"], case["image"], case["variant"])
        prompt = Prompt(inputs, np.random.default_rng(0), start_of(case), images, limit=28)
        [answer] = Decoder(recorded, rules, settings_of(case)).answer([prompt])
        said[kind] = answer.tokens, recorded.steps
    (cached, steps), (recomputed, others) = said.values()
    assert cached == recomputed
    for step, other in zip(steps, others, strict=True):
        assert list(step) == list(other)
        for row in step:
            torch.testing.assert_close(step[row], other[row], atol=1e-5, rtol=1e-5)


def mixed(model):
    """Prompts of different lengths: a picture, an edit, a caption and a text."""
    made = {"t2i": (2,), "edit": (0, "sq_gray.png", "base"), "caption": (1, "sq_astronaut.png", "base"), "text": (3,)}
    inputs = {name: prompt_inputs(model, *which) for name, which in made.items()}
    starts = {"t2i": (8197, 8806, 8807), "edit": (8197, 8805, 8805)}
    return [
        Prompt(
            inputs[name], np.random.default_rng([7, number]), starts.get(name, ()), name in starts, name in starts, 40
        )
        for number, name in enumerate(made)
    ]


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_answers_do_not_depend_on_their_neighbours(model, chameleon, greedy):
    rules = ChameleonRules(chameleon, LLM.vocab_size)
    settings = Settings(Sampling(0.9, 50, 0.9), (Sampling(1.0, 2000),), 3.0, greedy)
    decoder = Decoder(model, rules, settings)
    together = [answer.tokens for answer in decoder.answer(mixed(model))]
    alone = [decoder.answer([prompt])[0].tokens for prompt in mixed(model)]
    assert together == alone
    assert [len(tokens) for tokens in alone] == [32, 10, 40, 40]
    assert [block.size for block in chameleon.blocks(np.array(together[0]))] == [(64, 96)]


class Given:
    """A model that says what it is given, whatever it is fed."""

    device = torch.device("cpu")

    def __init__(self, vocab_size, conditional, unconditional):
        self.vocab_size, self._says, self.fed = vocab_size, (conditional, unconditional), ([], [])

    def embed(self, ids):
        return torch.tensor(ids, dtype=torch.float32)[:, None]

    def session(self, rows, room=0):
        return self

    def forget(self, row):
        self.fed[row].clear()

    def extend(self, inputs):
        for row, new in inputs.items():
            self.fed[row].append(new[:, 0].int().tolist())
        step = len(self.fed[0]) - 1
        return torch.stack([self._says[row](step) for row in inputs])


RULES = golden("generation/illume_rules.json")


@pytest.mark.parametrize("case", RULES["cases"], ids=lambda case: case["key"])
def test_images_of_two_levels_follow_the_published_rules(case):
    """The published processor on given scores. Up to the image's end: after it the published one allows sizes alone."""
    names = added_names((256, 768))
    vocabulary = DualViTokVocabulary({name: 100 + number for number, name in enumerate(names)}, "")
    ids = RULES["ids"]
    assert [vocabulary.image_start, vocabulary.image_end] == [ids["start_of_image"], ids["end_of_image"]]
    assert [[words.start, words.stop] for words in vocabulary.code_ids] == [RULES["level0"], RULES["level1"]]
    shapes = [case["level_rows_and_columns"][:2], case["level_rows_and_columns"][2:]]

    class Shaped(DualViTokRules):
        def layout(self, head):
            return self.format.vocabulary.layout(64, 128, shapes)

    known = SimpleNamespace(vocabulary=vocabulary, known_ids=range(RULES["vocabulary"]), turn_end=ids["end_of_text"])
    rules = Shaped(known, RULES["vocabulary"], ((64, 128),))

    def scores(step, which):
        name = f"{case['key']}.{which}.{step}"
        given = 4 * torch.from_numpy(synthetic_tensor(name, (RULES["vocabulary"], 1))[:, 0]).float()
        if which == "cond" and str(step) in case["bias"]:
            given[case["bias"][str(step)]] += 60
        return given

    model = Given(RULES["vocabulary"], lambda step: scores(step, "cond"), lambda step: scores(step, "uncond"))
    kinds = [Sampling(*each) for each in zip(case["temperature"], case["top_k"], case["top_p"], strict=True)]
    settings = Settings(kinds[0], tuple(kinds[1:]), case["guidance"], greedy=True)
    prompt, tag = tuple(case["unconditional_prompt"][:3]), tuple(case["unconditional_prompt"][3:])
    asked = Prompt(
        model.embed([1, 2]), np.random.default_rng(0), tag, only_image=True, unconditional=lambda head: [*prompt, *head]
    )
    [answer] = Decoder(model, rules, settings).answer([asked])
    expected = [dict(zip(RULES["step_columns"], step, strict=True)) for step in case["steps"]]
    length = [step["token"] for step in expected].index(ids["end_of_image"]) + 1
    assert answer.tokens == [*tag, *(step["token"] for step in expected[:length])] and answer.finish == "image"
    assert model.fed[1][0] == case["first_unconditional_input"]
    assert len(model.fed[1]) == case["unconditional_calls"]

    grammar = Grammar(rules)
    for token in tag:
        grammar.push(token)
    for number, step in enumerate(expected[:length]):
        kind, inside = grammar.next(), grammar.inside
        grammar.push(step["token"])
        if isinstance(kind, int):
            assert (kind, step["allowed"]) == (step["token"], 1)
        elif inside:
            given = guide(scores(number, "cond"), scores(number, "uncond"), case["guidance"])
            allowed = torch.from_numpy(rules.allowed(kind, images=True))
            left = restrict(given[None], allowed[None], [settings.sampling(kind)])[0]
            kept = left.isfinite().nonzero().squeeze(1)
            assert (len(kept), int(kept.sum())) == (step["allowed"], step["sum_of_allowed_ids"])
            assert left.softmax(-1)[step["token"]].item() == pytest.approx(step["probability_of_token"], abs=2e-6)


@pytest.mark.parametrize("variant", ["base", "anyres"])
def test_what_follows_a_picture_is_said_as_in_training(model, chameleon, chameleon_folder, variant):
    """Separator and continuous tokens of the decoded picture come before its end: the layout of a training sample,
    whose full forward pass has every greedy token as the greatest of those that are allowed.
    """
    vqgan = load_chameleon(chameleon_folder, device="cpu", decoder=True)
    reader = ImageReader(VISION.image_size, VISION.grid, variant == "anyres")
    interpreter = UniTokenInterpreter(chameleon, LLM.vocab_size, vqgan, reader, [(64, 64)], Wishes(), as_it_is)
    ids = np.array(SQUARE["3"]["token"])[:20]
    prompt = Prompt(model.embed(ids), np.random.default_rng(0), (8197, 8806, 8806), limit=40)
    settings = Settings(Sampling(), (Sampling(),), guidance=1.0, greedy=True)
    [answer] = Decoder(model, interpreter.rules, settings, interpreter.close_image).answer([prompt])
    [block] = chameleon.blocks(np.array(answer.tokens))
    assert block.end < len(answer.tokens) == 40

    picture = interpreter.picture(block.grids)
    whole = np.concatenate([ids, answer.tokens])
    sample = interleave("", whole, whole, [image_input(picture, reader.side, reader.grid, reader.anyres)])
    batch = pack([sample], VISION.image_size)
    with torch.no_grad():
        logits = model.model.lm_head(model.model.model(model.model.embed(batch), batch.positions, batch.lengths))
    places = np.flatnonzero((sample.features < 0) & ~between(sample.tokens))  # of the discrete tokens
    assert sample.tokens[places].tolist() == whole.tolist()
    grammar = Grammar(interpreter.rules)
    for number, token in enumerate(answer.tokens):
        kind = grammar.next()
        grammar.push(token)
        if number >= 3 and not isinstance(kind, int):
            allowed = torch.from_numpy(interpreter.rules.allowed(kind, images=True))
            scores = logits[places[len(ids) + number] - 1].masked_fill(~allowed, -torch.inf)
            assert scores.argmax().item() == token


def between(tokens):
    """Where the separator and the marks among continuous tokens are."""
    inside = np.zeros(len(tokens), bool)
    for start in np.flatnonzero(tokens == 8198):
        inside[start : start + int(np.argmax(tokens[start:] == 8196))] = True
    return inside


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = extended_tokenizer(tmp_path_factory.mktemp("lm"))
    text = TextTokenizer(folder)
    write_lm(folder, vocab_size=text.size)
    return CachedLM(load_causal_lm(folder)[0]), DualViTokFormat(text)


def test_a_transformers_model_with_its_cache_says_what_full_forward_passes_say(lm):
    """Prompts of different lengths, one of them a text, with and without guidance, greedy."""
    model, format = lm
    rules = DualViTokRules(format, model.vocab_size, ((256, 256), (384, 512)))
    prompts = [np.arange(20, 29), np.arange(40, 43), np.arange(60, 80)]
    starts = [rules.head((384, 512)), rules.head((256, 256)), ()]
    settings = Settings(Sampling(), (Sampling(), Sampling()), 2.0, greedy=True)
    asked = [
        Prompt(model.embed(ids), np.random.default_rng(0), start, bool(start), bool(start), 40, lambda head: [7, *head])
        for ids, start in zip(prompts, starts, strict=True)
    ]
    said = []
    for kind in (model, Recomputing(model)):
        recorded = Recorded(kind)
        said.append(([answer.tokens for answer in Decoder(recorded, rules, settings).answer(asked)], recorded.steps))
    assert said[0][0] == said[1][0]
    assert said[0][0] == [Decoder(model, rules, settings).answer([prompt])[0].tokens for prompt in asked]
    for step, other in zip(said[0][1], said[1][1], strict=True):
        for row in step:
            torch.testing.assert_close(step[row], other[row], atol=1e-5, rtol=1e-5)
    for ids, tokens in zip(prompts[2:], said[0][0][2:], strict=True):  # the text, by transformers alone
        whole = torch.tensor([[*ids, *tokens]])
        with torch.no_grad():
            logits = model.lm(input_ids=whole).logits[0, len(ids) - 1 : -1]
        allowed = torch.from_numpy(rules.allowed(Kind("text"), images=False))
        assert logits.masked_fill(~allowed, -torch.inf).argmax(-1).tolist() == tokens


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "size"), [("fixed_256", (256, 256)), ("fixed_anchors", None)])
def test_an_edit_is_asked_for_in_the_tokens_that_were_trained_on(
    tmp_path, dualvitok_config, dualvitok_checkpoint, tag, size
):
    """The image to edit is cropped and encoded as in codebook inference; the picture that is asked for is not read."""
    format = DualViTokFormat(TextTokenizer(extended_tokenizer(tmp_path)))
    tokenizer = load_dualvitok(dualvitok_config, str(dualvitok_checkpoint), device="cpu")
    interpreter = LMInterpreter(format, format.vocab_size, tokenizer, Wishes(size=size), as_it_is, IMAGES)
    lines = golden_lines(f"editing/{tag}/0000")
    for line, draft in zip(lines, format.drafts([Item(0, "", b"", line) for line in lines]), strict=True):
        sample = format.sample(draft, {})
        given = {"images": [*line["images"][:-1], "not_there.png"], "conversations": line["conversations"]}
        question = interpreter.question(Item(0, "", b"", given))
        assert question.ids.tolist() == sample.tokens[: int(np.argmax(sample.loss_mask))].tolist()
        assert question.task == "image" and list(question.size) == line["matched_ratios"][0]


def test_a_conversation_is_asked_for_in_the_tokens_that_were_trained_on(chameleon_folder):
    vqgan = load_chameleon(chameleon_folder, device="cpu")
    format = ChameleonFormat(TextTokenizer(chameleon_folder), image_dir=IMAGES)
    crops = crop_sizes(512, "variable")
    interpreter = UniTokenInterpreter(format, LLM.vocab_size, vqgan, None, crops, Wishes(), as_it_is)
    conversations = golden("chameleon_small/conversations.json")
    for number, task in ((1, "text"), (2, "image")):
        expected = golden("chameleon_small/expected_tokens.json")["variable"][str(number)]
        question = interpreter.question(Item(0, "", b"", conversations[number]))
        assert question.ids.tolist() == expected["token"][: int(np.argmax(np.array(expected["label"]) >= 0))]
        assert question.task == task
