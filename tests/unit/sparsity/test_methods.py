"""The methods against the papers' formulas, written out in float64, and against each other."""

import pytest
import torch

from minitron_megatron.config.calibration import Scheme
from minitron_megatron.config.sparsify import SparsifyMethod
from minitron_megatron.sparsity.columns import fix_columns
from minitron_megatron.sparsity.grids import Grid
from minitron_megatron.sparsity.methods import METHODS, Matrix, gptq, rounding, sparsegpt_rounded
from minitron_megatron.sparsity.patterns import NofM, Unstructured, broken_groups
from minitron_megatron.sparsity.refit import refit
from minitron_megatron.sparsity.second_moments import SecondMoments

from .direct import damped, fix_in_turn, problem

DAMPING = 0.01
TWO_OF_FOUR = NofM(2, 4)
ALL_ROWS = slice(None)


def matrix_of(weight, moments, by_activation=False):
    return Matrix(weight, SecondMoments(moments.clone(), DAMPING), by_activation)


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, NofM(1, 4), NofM(4, 8)], ids=str)
def test_sparsegpt_is_the_papers_row_by_row(pattern, by_activation):
    weight, _, moments = problem(rows=5, columns=24)
    matrix = matrix_of(weight, moments, by_activation)
    found, mask = METHODS[SparsifyMethod.SPARSEGPT](matrix, pattern)(ALL_ROWS)
    order = list(range(24))
    if by_activation:
        groups = sorted(range(24 // pattern.m), key=lambda g: -moments.diagonal()[g * pattern.m :][: pattern.m].sum())
        order = [group * pattern.m + i for group in groups for i in range(pattern.m)]
    for row in range(len(weight)):
        expected = fix_in_turn(weight[row], damped(moments, DAMPING), order, pattern.m, pattern.n)
        torch.testing.assert_close(found[row], expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(mask, found != 0)
    assert broken_groups(found, pattern) == 0


def test_blocks_of_columns_change_nothing(monkeypatch):
    weight, _, moments = problem(rows=4, columns=32)
    factor = SecondMoments(moments, DAMPING).factor()
    whole = fix_columns(weight, factor, pattern=TWO_OF_FOUR)
    monkeypatch.setattr("minitron_megatron.sparsity.columns.BLOCK", 8)
    blocks = fix_columns(weight, factor, pattern=TWO_OF_FOUR)
    torch.testing.assert_close(blocks[0], whole[0])
    assert torch.equal(blocks[1], whole[1])


@pytest.mark.parametrize("pattern", [NofM(2, 6), NofM(3, 5), NofM(40, 75)], ids=str)
def test_groups_need_not_divide_a_block(pattern):
    columns = 2 * 3 * 5 * 10
    weight, _, moments = problem(rows=3, columns=columns, tokens=2 * columns)
    found, mask = METHODS[SparsifyMethod.SPARSEGPT](matrix_of(weight, moments, True), pattern)(ALL_ROWS)
    assert (mask.unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all() and torch.equal(mask, found != 0)


@pytest.mark.parametrize("by_activation", [False, True])
def test_gptq_is_the_papers_row_by_row(by_activation):
    weight, _, moments = problem(rows=4, columns=32)
    grid = Grid.of(Scheme.W4A16, 32, 8)
    found, scales = gptq(matrix_of(weight, moments, by_activation), grid, torch.bfloat16)(weight, None)
    order = moments.diagonal().argsort(descending=True).tolist() if by_activation else list(range(32))
    for row in range(len(weight)):
        expected = fix_in_turn(
            weight[row],
            damped(moments, DAMPING),
            order,
            group=1,
            keep=1,
            rounding=lambda value, column, row=row: (
                (value / scales[row, column // 8]).round().clamp(-8, 7) * scales[row, column // 8]
            ),
        )
        torch.testing.assert_close(found[row], expected, rtol=1e-8, atol=1e-8)


def test_gptq_on_a_mask_leaves_zeros_zero():
    weight, _, moments = problem(rows=16, columns=64, tokens=200)
    mask = TWO_OF_FOUR.mask(weight.abs())
    found, scales = gptq(matrix_of(weight, moments, True), Grid.of(Scheme.W4A16, 64), torch.bfloat16)(weight, mask)
    assert not found[~mask].any()
    assert broken_groups(found, TWO_OF_FOUR) == 0
    codes = found / scales.repeat_interleave(64, 1)
    assert torch.equal(codes, codes.round()) and codes.min() >= -8 and codes.max() <= 7


def test_sparse_and_rounded_in_one_pass_is_both():
    weight, _, moments = problem(rows=16, columns=64, tokens=200)
    grid = Grid.of(Scheme.W4A16, 64, 32)
    solve = sparsegpt_rounded(matrix_of(weight, moments, True), TWO_OF_FOUR, grid, torch.bfloat16)
    found, mask, scales = solve(ALL_ROWS)
    assert broken_groups(found, TWO_OF_FOUR) == 0 and not found[~mask].any()
    codes = found / scales.repeat_interleave(32, 1)
    assert torch.equal(codes, codes.round())


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.5)], ids=str)
def test_refit_is_least_squares_on_the_mask(pattern):
    weight, inputs, moments = problem(rows=6, columns=16, tokens=60)
    mask = pattern.mask(weight.abs())
    found = refit(weight, mask, SecondMoments(moments, 1e-12), iterations=200)
    for row in range(len(weight)):
        kept = mask[row]
        solution = torch.linalg.lstsq(inputs[:, kept], inputs @ weight[row]).solution
        torch.testing.assert_close(found[row, kept], solution, rtol=1e-6, atol=1e-8)
    assert not found[~mask].any()


def test_a_refit_with_damping_minimises_the_damped_error():
    weight, _, moments = problem()
    mask, hessian = TWO_OF_FOUR.mask(weight.abs()), damped(moments, DAMPING)
    found = refit(weight, mask, SecondMoments(moments, DAMPING), iterations=200)
    gradient = (found - weight) @ hessian
    assert (gradient[mask].abs() / (weight @ hessian).abs().max()).max() < 1e-9


def test_methods_are_as_good_as_their_papers_say():
    """Each makes a smaller error than the one before: magnitude, Wanda, Wanda refitted, SparseGPT refitted, ALPS."""
    weight, _, moments = problem(rows=64, columns=128, tokens=512)
    known, errors = SecondMoments(moments, DAMPING), []
    for method, is_refitted in [
        (SparsifyMethod.MAGNITUDE, False),
        (SparsifyMethod.WANDA, False),
        (SparsifyMethod.WANDA, True),
        (SparsifyMethod.SPARSEGPT, True),
        (SparsifyMethod.ALPS, True),
    ]:
        new, mask = METHODS[method](Matrix(weight, known), TWO_OF_FOUR)(ALL_ROWS)
        assert broken_groups(new, TWO_OF_FOUR) == 0
        errors.append(float(known.error((refit(weight, mask, known, 50, new) if is_refitted else new) - weight)))
    assert errors == sorted(errors, reverse=True)


# Not those of the largest weights of a whole matrix, which have one threshold.
@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        (method, pattern)
        for method in METHODS
        for pattern in (TWO_OF_FOUR, Unstructured(0.3))
        if method is not SparsifyMethod.MAGNITUDE or pattern == TWO_OF_FOUR
    ],
)
def test_rows_do_not_depend_on_each_other(method, pattern):
    weight, _, moments = problem(rows=9, columns=32)
    solve = METHODS[method](matrix_of(weight, moments, True), pattern)
    whole = solve(ALL_ROWS)
    parts = [solve(slice(0, 4)), solve(slice(4, 9))]
    for index in range(2):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), whole[index])


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_input_costs_nothing_and_breaks_nothing(method):
    weight, inputs, _ = problem(columns=16)
    inputs[:, [3, 8]] = 0
    known = SecondMoments(inputs.T @ inputs, DAMPING)
    new, mask = METHODS[method](Matrix(weight, known), TWO_OF_FOUR)(ALL_ROWS)
    assert new.isfinite().all() and broken_groups(refit(weight, mask, known, 20, new), TWO_OF_FOUR) == 0


@pytest.mark.parametrize("order", [None, torch.arange(29, -1, -1)], ids=["own", "another"])
def test_the_factor_is_the_inverse_of_sparsegpts(order, monkeypatch):
    monkeypatch.setattr("minitron_megatron.sparsity.second_moments.BLOCK", 8)
    _, _, moments = problem(columns=30)
    hessian = damped(moments, DAMPING)
    ordered = hessian if order is None else hessian[order][:, order]
    expected = torch.linalg.cholesky(torch.linalg.inv(ordered), upper=True)
    found = SecondMoments(moments, DAMPING).factor(order)
    torch.testing.assert_close(torch.linalg.inv(found.triu()), expected)


def test_the_error_is_that_of_the_outputs(monkeypatch):
    monkeypatch.setattr("minitron_megatron.sparsity.second_moments.BLOCK", 8)
    change, inputs, _ = problem(columns=30)
    inputs[:, 4] = 0
    found = SecondMoments(inputs.T @ inputs, DAMPING).error(change)
    torch.testing.assert_close(found, (change @ inputs.T).square().sum())


def test_moments_that_cannot_be_inverted_are_damped_more_and_that_is_said(caplog):
    moments = torch.eye(8, dtype=torch.float64)
    moments[0, 1] = moments[1, 0] = 1.05  # no second moments at all
    known = SecondMoments(moments, DAMPING, "layer 3")
    assert known.factor().isfinite().all()
    assert "layer 3: second moments of its inputs cannot be inverted: damped 10 times" in caplog.text


@pytest.mark.parametrize("scheme", Scheme)
def test_rounding_is_to_the_nearest_number_of_the_grid(scheme):
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid.of(scheme, 64)
    scales = grid.scales(weight, torch.bfloat16)
    assert scales.shape == (3, 1) and torch.equal(scales, scales.bfloat16().float())
    every = torch.arange(-8, 8.0) if scheme is Scheme.W4A16 else torch.arange(-128, 128.0)
    if scheme is Scheme.FP8:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        every = every[every.isfinite()]
    found = grid.round(weight, grid.spread(scales))
    nearest = (weight[..., None] - every * scales[..., None]).abs().amin(-1)
    torch.testing.assert_close((found - weight).abs(), nearest)
    assert torch.equal(rounding(grid, scales)(weight[:, 5], 5), found[:, 5])


def test_a_group_of_zeros_stays_zero():
    weight = torch.zeros(2, 64)
    weight[0, 40] = 1
    grid = Grid.of(Scheme.W4A16, 64, 32)
    assert torch.equal(
        grid.round(weight, grid.spread(grid.scales(weight, torch.bfloat16))).count_nonzero(), torch.tensor(1)
    )


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (576, 64), (96, 32), (100, 100)])
def test_groups_are_the_largest_that_divide(columns, group):
    assert Grid.of(Scheme.W4A16, columns).group == group
    assert Grid.of(Scheme.FP8, columns).group == columns
