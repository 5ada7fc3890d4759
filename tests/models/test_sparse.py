"""The sparse encoder: which tokens are kept, what is left alone, and what the scoring network learns from.

Legend: B images, S tokens of all levels, k kept tokens.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from detrlib.attention.deformable import Samples, splat
from detrlib.data import collate
from detrlib.losses.criterion import Criterion, token_losses
from detrlib.models.outputs import Predictions, Tokens
from detrlib.models.sparse import Kept, ScoringNetwork, keep_best

REFINE = {"refine": True}
TWO_STAGE = REFINE | {"two_stage": True}
EFFICIENT = TWO_STAGE | {"query_init": "memory", "class_specific_proposals": True}
SPARSE = EFFICIENT | {"rho": 0.3, "encoder_auxiliary": True}
SIZES, CANVAS = [(70, 101), (128, 64), (97, 160)], (128, 160)


WEIGHTS = {"weight_mask": 0.7, "weight_class": 2.0}


def padded_scores() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of 3 images with 20, 7 and 1 valid tokens of 20; padding scores best."""
    torch.manual_seed(0)
    padding = torch.arange(20) >= torch.tensor([[20], [7], [1]])
    return torch.randn(3, 20).masked_fill(padding, 9.0), padding


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_the_best_valid_tokens_are_kept(ratio):
    scores, padding = padded_scores()
    kept = keep_best(scores, padding, ratio)
    mask = kept.mask(20)
    for image, valid in enumerate((20, 7, 1)):
        number = min(int(valid * ratio) + 1, valid)
        expected = torch.zeros(20, dtype=torch.bool)
        expected[scores[image, :valid].topk(number).indices] = True
        assert torch.equal(mask[image], expected)
        assert (~kept.surplus[image]).sum() == number
    assert (kept.index.diff(dim=1) > 0).all()
    assert torch.equal(keep_best(scores[:1], None, ratio).mask(20)[0], mask[0])


def test_gather_and_scatter():
    tokens = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    none = torch.zeros(2, 2, dtype=torch.bool)
    kept = Kept(torch.tensor([[0, 3], [2, 4]]), torch.tensor([[False, False], [True, False]]), none)
    assert torch.equal(kept.gather(tokens), torch.stack([tokens[0, [0, 3]], tokens[1, [2, 4]]]))
    assert torch.equal(kept.gather(tokens[:1])[1], tokens[0, [2, 4]])  # one position for all images
    found = kept.scatter(tokens, torch.full((2, 2, 3), -1.0))
    changed = (found != tokens).all(-1)
    assert changed.tolist() == [[True, False, False, True, False], [False, False, False, False, True]]


def test_all_tokens_kept_is_the_dense_encoder(deformable, padded_batch):
    sparse, dense = deformable("sparse"), deformable("sparse", {"rho": 1.0})
    assert dense.transformer.enc_mask_predictor is None
    dense.load_state_dict({name: value for name, value in sparse.state_dict().items() if "enc_mask" not in name})
    sparse.keep_ratio = 1.0
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    with torch.no_grad():
        found, expected = sparse(images, padding), dense(images, padding)
        alone, expected_alone = (model(images[:1, :, :70, :101], padding[:1, :70, :101]) for model in (sparse, dense))
    assert torch.equal(found.tokens.kept, ~found.tokens.padding)
    for one, other in [(found, expected), (alone, expected_alone)]:
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-5)
    assert torch.equal(alone.logits, expected_alone.logits)  # to the last bit where nothing is padded


def test_other_tokens_pass_the_encoder_unchanged(deformable, padded_batch):
    model = deformable("sparse")
    seen = {}
    encoder = model.transformer.encoder
    forward = encoder.forward

    def spy(memory, kept, need_samples):
        result = forward(memory, kept, need_samples)
        seen.update(before=memory.tokens, after=result[0].tokens, states=result[1])
        return result

    encoder.forward = spy
    with torch.no_grad():
        tokens = model(*padded_batch(*SIZES, canvas=CANVAS)).tokens
    changed = (seen["before"] != seen["after"]).any(-1)
    assert torch.equal(changed, tokens.kept)
    valid = (~tokens.padding).sum(1)
    assert tokens.kept.sum(1).tolist() == [int(n * 0.3) + 1 for n in valid.tolist()]
    listed = int(0.3 * tokens.kept.shape[1]) + 1  # as many as of an image without padding, which shapes tell
    assert [state.shape[1] for state in seen["states"]] == [listed] * 3


def test_an_image_keeps_the_same_tokens_alone_and_in_a_batch(deformable, padded_batch):
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    models = {choice: deformable("sparse", compatibility={"padding": choice}) for choice in ("exact", "official")}
    differs = {}
    for choice, model in models.items():
        with torch.no_grad():
            together = model(images, padding).tokens
            alone = model(images[:1, :, :70, :101], padding[:1, :70, :101]).tokens
        inside = ~together.padding[0]
        differs[choice] = (together.logits[0, inside] - alone.logits[0]).abs().max().item()
        if choice == "exact":
            assert torch.equal(together.kept[0, inside], alone.kept[0])
            assert not together.kept[0, ~inside].any()
    assert differs["exact"] < 1e-4 < 1e-3 < differs["official"]


def test_scores_mix_what_a_token_is_with_what_the_image_is():
    torch.manual_seed(0)
    network, tokens = ScoringNetwork(16), torch.randn(1, 6, 16)
    scores = network(tokens, None)
    assert scores.shape == (1, 6)
    other = tokens.clone()
    other[0, 5] += torch.randn(16)
    assert ((network(other, None) - scores)[0, :5] != 0).all()
    padding = torch.tensor([[False] * 5 + [True]])
    torch.testing.assert_close(network(other, padding)[0, :5], network(tokens[:, :5], None)[0])
    network.official_padding = True
    torch.testing.assert_close(network(other, padding)[0, :5], network(other, None)[0, :5])
    assert network(other, padding)[0, 5] == network(other, None).min()


@pytest.fixture(scope="session")
def official_tokens():
    def official_tokens(model, images: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and kept tokens [B,S] of the official code, from the projected maps of its Deformable DETR."""
        maps = model.input_proj(model.backbone(images, padding), padding)
        hidden = torch.cat([level.key_padding for level in maps], 1)
        tokens, centres = [], []
        for level, embed in zip(maps, model.transformer.level_embed, strict=True):
            position = model.position(level.padding) + embed[:, None, None]
            tokens.append((level.features + position).flatten(2).mT)
            valid = ~level.padding
            axes = [(valid[:, 0].sum(1), level.grid[1]), (valid[:, :, 0].sum(1), level.grid[0])]
            x, y = ((torch.arange(cells) + 0.5) / count[:, None] for count, cells in axes)
            centres.append(torch.stack([x[:, None].expand(level.padding.shape), y[:, :, None].expand_as(valid)], -1))
        inside = torch.cat([((c > 0.01) & (c < 0.99)).all(-1).flatten(1) for c in centres], 1)
        tokens = torch.cat(tokens, 1).masked_fill((hidden | ~inside)[..., None], 0.0)
        network = model.transformer.enc_mask_predictor
        own, shared = network.layer1(
            model.transformer.enc_output_norm(model.transformer.enc_output(tokens))
        ).tensor_split(2, -1)
        scores = network.layer2(torch.cat([own, shared.mean(1, keepdim=True).expand_as(own)], -1))[..., 0]
        scores = scores.masked_fill(hidden, scores.min())
        kept = torch.zeros_like(hidden)
        for image, number in enumerate(((~hidden).sum(1) * model.keep_ratio).int() + 1):
            kept[image, scores[image].topk(int(number)).indices] = True
        return scores, kept

    return official_tokens


def test_official_padding_is_that_of_the_official_code(deformable, official_tokens):
    """Images of odd sizes in batches as `collate` makes them; an exact model keeps the tokens of each image alone."""
    options = {"levels": 4, "stages": None}, {"name": "resnet18", "weights": "none"}
    models = {}
    for choice in ("official", "exact"):
        compatibility = {"padding": choice, "dam": "official"}
        model = deformable("sparse", options[0], backbone=options[1], compatibility=compatibility)
        models[choice] = model.double()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in [(123, 189), (193, 67)]]
    batch = collate([(image, {}) for image in images])
    with torch.no_grad():
        official, exact = (models[choice](*batch[:2]).tokens for choice in ("official", "exact"))
        scores, kept = official_tokens(models["official"], *batch[:2])
        torch.testing.assert_close(official.logits, scores.float())
        assert torch.equal(official.kept, kept)
        attended = sum(splat(samples, official.shapes, 0.0) for samples in official.samples)
        best = attended.masked_fill(official.padding, -1.0).topk(int(kept.sum(1).max()), dim=1).indices
        wanted = torch.zeros_like(official.logits)
        for image, number in enumerate(kept.sum(1).tolist()):
            wanted[image, best[image, :number]] = 1.0
        expected = F.multilabel_soft_margin_loss(official.logits, wanted)
        torch.testing.assert_close(token_losses(official)["loss_mask"], expected)
        for number, image in enumerate(images):
            alone = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
            scores, kept = official_tokens(models["official"], image[None], alone)
            inside = ~exact.padding[number]
            torch.testing.assert_close(exact.logits[number, inside], scores[0].float(), rtol=0, atol=1e-5)
            assert torch.equal(exact.kept[number, inside], kept[0])
            assert kept[0].sum() < kept.shape[1]


# Losses


def some_tokens(padded: bool = True) -> Tokens:
    """Tokens of 2 images on levels of 4 x 6 and 2 x 3 cells with the samples of 2 decoder layers."""
    torch.manual_seed(0)
    shapes = [(4, 6), (2, 3)]
    padding = torch.zeros(2, 30, dtype=torch.bool)
    if padded:
        padding[1, 18:24] = padding[1, 27:] = True
    logits = torch.randn(2, 30, requires_grad=True)
    kept = keep_best(logits.detach(), padding, 0.2)
    samples = [Samples(torch.rand(2, 5, 3, 2, 2, 2), torch.rand(2, 5, 3, 2, 2)) for _ in range(2)]
    return Tokens(logits, kept.mask(30), padding if padded else None, shapes, samples, kept.index.shape[1])


def test_decoder_map_is_what_tokens_give_in_sum():
    tokens = some_tokens()
    found = tokens.decoder_map()
    expected = splat(tokens.samples[0], tokens.shapes) + splat(tokens.samples[1], tokens.shapes)
    torch.testing.assert_close(found, expected.masked_fill(tokens.padding, 0.0))
    shifted = dataclasses.replace(tokens, shift=0.0).decoder_map()
    assert (shifted - found).abs().max() > 0.1


def test_mask_loss_is_torchs_on_valid_tokens():
    tokens = some_tokens()
    terms = token_losses(tokens)
    attended, losses = tokens.decoder_map(), []
    for image in range(2):
        inside = ~tokens.padding[image]
        number = int(tokens.kept[image].sum())
        assert number == int(inside.sum() * 0.2) + 1
        wanted = torch.zeros(int(inside.sum()))
        wanted[attended[image, inside].topk(number).indices] = 1
        losses.append(F.multilabel_soft_margin_loss(tokens.logits[image, inside], wanted))
    torch.testing.assert_close(terms["loss_mask"], torch.stack(losses).mean())
    terms["loss_mask"].backward()
    assert (tokens.logits.grad[~tokens.padding] != 0).all() and (tokens.logits.grad[tokens.padding] == 0).all()


def test_correlation_is_the_share_of_attention_on_kept_tokens():
    tokens = some_tokens(padded=False)
    terms, attended = token_losses(tokens), tokens.decoder_map()
    for name, part in [("", slice(None)), ("_level_0", slice(24)), ("_level_1", slice(24, None))]:
        shares = [(attended[i, part] * tokens.kept[i, part]).sum() / attended[i, part].sum() for i in range(2)]
        torch.testing.assert_close(terms[f"dam_correlation{name}"], torch.stack(shares).mean())
    tokens.kept = torch.ones_like(tokens.kept)
    assert token_losses(tokens)["dam_correlation"].item() == pytest.approx(1)


def random_targets(*counts: int) -> list[dict]:
    boxes = [torch.cat([0.3 + 0.4 * torch.rand(n, 2), 0.1 + 0.2 * torch.rand(n, 2)], 1) for n in counts]
    return [{"labels": torch.randint(5, (len(b),)), "boxes": b} for b in boxes]


def test_encoder_losses_have_names_of_their_own_and_count(deformable, padded_batch):
    model = deformable("sparse")
    predictions, targets = model(*padded_batch((70, 101), (96, 128), canvas=(96, 128))), random_targets(2, 1)
    total, terms = Criterion(**WEIGHTS)(predictions, targets)
    suffixes = ["", "_0", "_1", "_2", "_enc", "_enc_0", "_enc_1"]
    weights = {"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    names = {f"{name}{suffix}" for name in weights for suffix in suffixes} | {"loss_mask"}
    assert {name for name in terms if name.startswith("loss")} == names
    expected = sum(weight * terms[name + suffix] for name, weight in weights.items() for suffix in suffixes)
    torch.testing.assert_close(total, expected + 0.7 * terms["loss_mask"])
    assert not terms["dam_correlation"].requires_grad


def test_proposals_of_any_object_learn_class_zero():
    torch.manual_seed(0)
    targets = random_targets(3)
    targets[0]["labels"] = torch.tensor([1, 2, 4])
    logits, boxes = torch.randn(1, 6, 5), torch.rand(1, 6, 4)
    found = Criterion(**WEIGHTS)(Predictions(logits, boxes, "sigmoid", any_object=True), targets)[1]
    zeros = [targets[0] | {"labels": torch.zeros(3, dtype=torch.long)}]
    expected = Criterion(**WEIGHTS)(Predictions(logits, boxes, "sigmoid"), zeros)[1]
    assert found["loss_class"] == expected["loss_class"]
    assert found["loss_class"] != Criterion(**WEIGHTS)(Predictions(logits, boxes, "sigmoid"), targets)[1]["loss_class"]


@pytest.mark.parametrize("variant", ["plain", "refine", "two-stage", "efficient", "sparse"])
def test_losses_fall_and_no_objects_are_no_trouble(variant, deformable, padded_batch):
    model = deformable(variant, dropout=0.0).train()  # whatever a step draws
    images, padding = padded_batch((70, 101), (96, 128), canvas=(96, 128))
    criterion, targets = Criterion(weight_class=2.0, cost_class=2.0), random_targets(2, 3)
    total = criterion(model(images, padding), random_targets(0, 0))[0]
    total.backward()
    for parameter in model.parameters():  # none may be left out: several processes would wait for its gradient
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        total, _ = criterion(model(images, padding), targets)
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert min(losses[-3:]) < 0.8 * losses[0]


def test_padding_of_tokens_costs_nothing_in_proposals(deformable, padded_batch):
    """The loss of proposals of an image is the same however much padding its batch has."""
    model = deformable("efficient")
    images, padding = padded_batch((64, 96), canvas=(96, 160))
    targets = random_targets(2)
    with torch.no_grad():
        wide = Criterion(**WEIGHTS)(model(images, padding), targets)[1]
        tight = Criterion(**WEIGHTS)(model(images[..., :64, :96], padding[..., :64, :96]), targets)[1]
    for name in ("loss_class_enc", "loss_bbox_enc", "loss_giou_enc"):
        assert wide[name].item() == pytest.approx(tight[name].item(), rel=1e-4)


def test_official_switches_are_built(deformable, padded_batch):
    model = deformable("sparse", compatibility={"dam": "official", "padding": "official"})
    assert model.transformer.enc_mask_predictor.official_padding
    tokens = model(*padded_batch((64, 64), canvas=(64, 64))).tokens
    assert tokens.shift == 0.0 and tokens.official_padding
    assert SPARSE["rho"] == model.keep_ratio == 0.3
