"""Memory of large CPU tensors: used again only when its tensor is gone, and only where asked."""

import torch

from fewbits.kernels.memory import LARGE, empty, used_again

CPU = torch.device("cpu")
SHAPE = (LARGE >> 10, 1 << 10)


def filled(value: int) -> torch.Tensor:
    return empty(SHAPE, torch.uint8, CPU).fill_(value)


def test_memory_of_a_tensor_that_is_gone_is_used_again():
    with used_again():
        first, second = filled(1), filled(2)
        part, places = second[3:], {first.data_ptr(), second.data_ptr()}
        del first, second  # `part` still needs the second one
        third, fourth = filled(3), filled(4)
        assert third.data_ptr() in places
        assert fourth.data_ptr() not in places
        assert [int(each.min()) for each in (part, third, fourth)] == [2, 3, 4]
        assert [int(each.max()) for each in (part, third, fourth)] == [2, 3, 4]
    assert int(part.sum()) == 2 * part.numel()  # also when nothing is used again any more


def test_a_smaller_tensor_takes_the_smallest_memory_that_holds_it():
    with used_again():
        large, small = empty((4 * LARGE,), torch.uint8, CPU), empty((2 * LARGE,), torch.uint8, CPU)
        place = small.data_ptr()
        del large, small
        assert empty((LARGE,), torch.uint8, CPU).data_ptr() == place


def test_large_and_small_tensors_have_the_shape_and_dtype_asked_for():
    for rows in (1, LARGE):
        for dtype in (torch.int8, torch.float8_e4m3fn, torch.float32):
            made = empty((rows, 4), dtype, CPU)
            assert made.shape == (rows, 4) and made.dtype == dtype and made.is_contiguous()
            assert made.untyped_storage().nbytes() == made.nbytes
