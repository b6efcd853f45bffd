"""What is looked at around a forward, and when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchord.cache.errors import CacheError, InvalidInput
from torchord.coordinator.compute.forward_watch import ForwardWatch, due, sum_of_bits


def test_bytes_are_compared_densely_at_first_then_seldom_and_never_no_more() -> None:
    looked = [[due((step, shard)) for shard in range(4)] for step in range(4096)]
    assert all(all(shards) for shards in looked[:5]) and all(looked[1024]) and all(looked[2048])
    late = [shard for shards in looked[1025:2048] for shard in shards]
    assert 1 / 32 < sum(late) / len(late) < 1 / 8
    assert looked == [[due((step, shard)) for shard in range(4)] for step in range(4096)]
    local = [due((0, 0, number)) for number in range(1000)]
    assert all(local[:5]) and sum(local) < 100


def watch(features: int = 300) -> tuple[nn.Linear, ForwardWatch]:
    """A layer, by default one that is too large to be compared each time."""
    layer = nn.Linear(features, features)
    return layer, ForwardWatch(layer, dict(layer.named_parameters()), {})


def test_a_counted_write_of_unknown_bytes_is_tried_again_and_then_looked_at_whole() -> None:
    layer, looking = watch()
    looking.begin(whole=False)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())
    with pytest.raises(CacheError, match="'weight'"):
        looking.end()
    looking.begin(whole=False)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())
    looking.end()
    looking.begin(whole=False)
    layer.weight.data.mul_(2.0)
    with pytest.raises(InvalidInput, match="trained parameter 'weight' of the model"):
        looking.end()


def test_a_write_past_the_count_is_found_where_bytes_are_compared_and_a_move_each_time() -> None:
    layer, looking = watch()
    looking.begin(whole=False)
    layer.weight.data[0, 1] += 2.0  # one element, which is not among those that are looked at each time
    looking.end()
    looking.begin(whole=True)
    layer.weight.data[0, 1] += 2.0
    with pytest.raises(InvalidInput, match="trained parameter 'weight'"):
        looking.end()
    looking.begin(whole=False)
    layer.bias.data = layer.bias.data + 1
    with pytest.raises(CacheError, match="'bias'"):
        looking.end()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_whole_tensor_written_past_the_count_is_found_each_time(dtype: torch.dtype) -> None:
    for name in ("weight", "bias"):
        for _ in range(5):
            layer = nn.Linear(600, 600, dtype=dtype)
            looking = ForwardWatch(layer, dict(layer.named_parameters()), {})
            for _ in range(3):
                looking.begin(whole=False)
                looking.end()
            looking.begin(whole=False)
            getattr(layer, name).data.sub_(0.25)
            with pytest.raises(InvalidInput, match=f"trained parameter '{name}'"):
                looking.end()


def test_of_many_parameters_some_are_looked_at_in_turn() -> None:
    layer = nn.ParameterList(nn.Parameter(torch.ones(3000)) for _ in range(75))
    found = 0
    for name, parameter in layer.named_parameters():
        looking = ForwardWatch(layer, dict(layer.named_parameters()), {})
        for _ in range(75):
            looking.begin(whole=False)
            parameter.data.mul_(2.0)
            try:
                looking.end()
            except InvalidInput as error:
                assert f"'{name}'" in str(error)
                found += 1
                break
    assert found == 75


def test_elements_are_read_of_no_memory_that_a_parameter_has_left() -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.ones(300, 300).t(), requires_grad=False)
    layer.wide = nn.Parameter(torch.ones(300, 1).expand(300, 300), requires_grad=False)
    layer.none = nn.Parameter(torch.ones(0, 3), requires_grad=False)
    held = dict(layer.named_parameters())
    looking = ForwardWatch(layer, held, held)
    looking.begin(whole=False)
    layer.weight.mul_(2.0)  # counted, and carried
    layer.none.data = torch.ones(2, 3)
    looking.end()
    looking.begin(whole=False)
    layer.weight.data = torch.zeros(3, 3)
    looking.end()
    looking.begin(whole=False)
    layer.wide.data[:, :1] += 1.0
    looking.end()


def test_few_bytes_are_compared_each_time() -> None:
    layer, looking = watch(2)
    looking.begin(whole=False)
    layer.weight.data.mul_(2.0)
    with pytest.raises(InvalidInput, match="trained parameter 'weight'"):
        looking.end()


DTYPES = [
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5)])
def test_the_sum_that_a_device_compares_by_sees_one_element(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    before = sum_of_bits(tensor)
    assert before.shape == () and before.dtype == torch.int64
    tensor.view(-1)[-1] = 1
    assert sum_of_bits(tensor) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_of_any_dtype_is_seen(dtype: torch.dtype) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(3, 5, dtype=dtype).t(), requires_grad=False)
    looking = ForwardWatch(layer, {"weight": layer.weight}, {})
    looking.begin(whole=True)
    looking.end()
    looking.begin(whole=True)
    layer.weight.data[4, 2] = 1
    with pytest.raises(InvalidInput, match="'weight'"):
        looking.end()
