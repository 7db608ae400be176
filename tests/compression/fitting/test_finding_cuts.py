"""Points from which a network can go on."""

from dataclasses import dataclass

import pytest
import torch
from small_networks import pictures
from torch import Tensor, nn

from sbf_dist.compression.fitting.finding_cuts import find_cuts
from sbf_dist.models import build

IMAGES = pictures(3)


class Chain(nn.Module):
    """Three convolutions; the tests change what is done between them."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.three = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.three(self.two(self.one(x).relu_()).relu_()).mean((2, 3))


LAYERS = ["one", "two", "three"]


def cuts_of(model, layers=LAYERS, images=IMAGES):
    return {name: cut.last for name, cut in find_cuts(model.eval(), images, layers).items()}


def test_a_chain_goes_on_from_each_layer():
    assert cuts_of(Chain()) == {"two": "one", "three": "two"}


def test_blocks_are_points_to_go_on_from():
    model = build("cifar_resnet14", 5).eval()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    cuts = find_cuts(model, IMAGES, [n for n in layers if "shortcut" not in n])
    assert len({cut.last for cut in cuts.values()}) >= 6
    assert {len(cut.kept) for cut in cuts.values()} == {1}


def test_inside_a_block_there_is_none_of_one_tensor():
    class Block(Chain):
        def forward(self, x):
            y = self.one(x)
            return (y + self.three(self.two(y).relu())).mean((2, 3))

    assert cuts_of(Block()) == {"two": "one", "three": "one"}


def test_what_reads_the_images_at_its_end_has_none():
    class ImagesAgain(Chain):
        def forward(self, x):
            return super().forward(x) + x.mean()

    assert cuts_of(ImagesAgain()) == {}


@pytest.mark.parametrize(
    "value",
    [
        lambda y: float(y.mean()),
        lambda y: y.mean().item(),
        lambda y: y.mean().tolist(),
        lambda y: float(y.mean().numpy()),
        lambda y: 2.0 if y.mean() > 0 else 1.0,
        lambda y: len(y[y > 0]),
        lambda y: len(torch.nonzero(y)),
        lambda y: float(torch.equal(y, y + 1)),
    ],
    ids=["float", "item", "tolist", "numpy", "if", "mask", "nonzero", "equal"],
)
def test_what_takes_values_out_of_tensors_has_none(value):
    class Taking(Chain):
        def forward(self, x):
            scale = value(self.one(x).detach())
            return super().forward(x) * scale

    assert cuts_of(Taking()) == {}


def test_branches_on_shapes_do_no_harm():
    class Shapes(Chain):
        def forward(self, x):
            size = x.shape[-2:]
            y = self.two(self.one(x))
            if size[0] > 4 and len(y) > 0:
                y = nn.functional.interpolate(y, size=size)
            return self.three(y).mean((2, 3))

    assert cuts_of(Shapes()) == {"two": "one", "three": "two"}


def test_a_comparison_that_is_used_later_is_part_of_the_state():
    class Mask(Chain):
        def forward(self, x):
            y = self.one(x)
            mask = y > 0
            return torch.where(mask, self.three(self.two(y)), 0.0).mean((2, 3))

    # The mask is no module's output.
    assert cuts_of(Mask()) == {"two": "one", "three": "one"}


def test_modules_that_are_called_twice_are_not_left_out():
    class Twice(Chain):
        def forward(self, x):
            y = self.two(self.one(x))
            return self.three(self.two(y)).mean((2, 3))

    assert cuts_of(Twice(), ["one", "three"]) == {"three": "one"}

    class Norms(Chain):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.three(self.act(self.two(self.act(self.one(x))))).mean((2, 3))

    assert cuts_of(Norms()) == {"two": "one", "three": "one"}  # only before its first call


def test_modules_with_hooks_are_not_left_out():
    model = Chain()
    model.one.register_forward_hook(lambda *args: args[2] * 2)
    assert cuts_of(model) == {}


def test_dropout_does_nothing_and_the_network_goes_on_behind_it():
    class Dropping(Chain):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.three(self.drop(self.two(self.one(x)))).mean((2, 3))

    assert cuts_of(Dropping()) == {"two": "one", "three": "drop"}


def test_a_network_that_draws_at_random_has_none():
    class Drawing(Chain):
        def forward(self, x):
            return super().forward(x) + torch.rand(8)

    assert cuts_of(Drawing()) == {}


@dataclass
class Output:
    logits: Tensor
    features: list


def test_several_outputs_count_whatever_holds_them():
    class Several(Chain):
        def forward(self, x):
            y = self.one(x)
            z = self.two(y)
            return Output(logits=self.three(z).mean((2, 3)), features=[{"y": y}])

    # What "one" gave is an output, too: two tensors, and there are few layers.
    assert cuts_of(Several()) == {"two": "one", "three": "one"}


def test_modules_may_give_tuples_that_are_not_read_any_more():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(x).relu(), len(x)

    class Tuples(Chain):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            y, _ = self.pair(x)
            return self.three(self.two(y.relu())).mean((2, 3))

    assert cuts_of(Tuples(), ["two", "three"]) == {"two": "pair.conv", "three": "two"}


def test_where_no_tensor_is_all_for_long_several_are_kept():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 3, padding=1) for i in range(20))
            self.stem = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            features = [self.stem(x)]
            for conv in self.convs:
                features.append(conv(torch.cat(features, 1)))
            return torch.cat(features, 1).mean((2, 3))

    model = Dense().eval()
    layers = ["stem", *(f"convs.{i}" for i in range(20))]
    kept = [len(cut.kept) for cut in find_cuts(model, IMAGES, layers).values()]
    assert sorted(set(kept)) == [1, 10, 19]


def test_constants_and_weights_are_no_part_of_the_state():
    class Constants(Chain):
        def __init__(self):
            super().__init__()
            self.mean = torch.tensor([0.1])
            self.register_buffer("scale", torch.ones(1))

        def forward(self, x):
            y = self.two(self.one(x - self.mean))
            return self.three(y * torch.tensor(2.0) + torch.ones(1)).mean((2, 3)) * self.scale

    assert cuts_of(Constants()) == {"two": "one", "three": "two"}


def test_the_networks_own_code_may_ask_for_the_layout_of_what_is_left_out():
    class Strict(Chain):
        def forward(self, x):
            y = self.one(x)
            if not y.is_contiguous():
                raise ValueError("not contiguous")
            return self.three(self.two(y.view(-1, 8, 10, 10))).mean((2, 3))

    assert cuts_of(Strict()) == {"two": "one", "three": "two"}


def test_code_that_fails_on_blanks_has_no_points():
    class Failing(Chain):
        def forward(self, x):
            y = self.one(x)
            torch.linalg.cholesky(y[0, 0] @ y[0, 0].T + torch.eye(10))
            return self.three(self.two(y)).mean((2, 3))

    assert cuts_of(Failing()) == {"two": "one", "three": "one"}


def test_forwards_that_are_put_on_a_module_come_back():
    model = Chain()
    model.one.forward = lambda x, own=model.one: nn.Conv2d.forward(own, x)
    put = model.one.forward
    assert cuts_of(model) == {"two": "one", "three": "two"}
    assert model.one.forward is put
    assert "forward" not in model.two.__dict__


def test_in_double_precision():
    assert cuts_of(Chain().double(), images=IMAGES.double()) == {"two": "one", "three": "two"}


def test_a_pass_is_watched_without_changing_the_network():
    model = build("cifar_resnet8", 5).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_cuts(model, IMAGES, ["stages.1.0.conv1"])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Keeps(nn.Module):
    """A convolution that keeps what it gives as an attribute."""

    def __init__(self, inputs):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(inputs, 8, 3, padding=1), None

    def forward(self, x):
        self.kept = self.conv(x)
        return self.kept


SYMMETRIC = torch.arange(100.0).view(10, 10).add(1).expand(3, 3, 10, 10)


@pytest.mark.parametrize(
    "images", [IMAGES, IMAGES[:1], SYMMETRIC + SYMMETRIC.flip(-1)], ids=["3", "1", "symmetric"]
)
def test_what_a_module_keeps_and_another_reads_is_computed_in_each_pass(images):
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = Keeps(3), Keeps(8), Keeps(8)

        def forward(self, x):
            y = self.three(self.two(self.one(x)))
            return (y + self.one.kept).mean((2, 3))

    assert cuts_of(Kept(), ["one.conv", "two.conv", "three.conv"], images) == {}
