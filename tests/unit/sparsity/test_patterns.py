"""Masks: the number that stays, which ones, and ties."""

import itertools

import numpy as np
import pytest
import torch

from minitron_megatron.sparsity.patterns import NofM, Unstructured, broken_groups

PATTERNS = [NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(1, 2), NofM(3, 16)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_n_of_every_m_stay_and_those_with_the_highest_scores(pattern):
    scores = torch.randn(5, 6 * pattern.m, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    mask = pattern.mask(scores)
    for row, start in itertools.product(range(5), range(0, scores.shape[1], pattern.m)):
        group = scores[row, start : start + pattern.m].tolist()
        best = sorted(range(pattern.m), key=lambda i: (-group[i], i))[: pattern.n]
        assert mask[row, start : start + pattern.m].nonzero().flatten().tolist() == sorted(best)


def test_an_unstructured_mask_keeps_the_highest_of_each_row_and_of_equal_ones_the_first():
    scores = torch.tensor([[3.0, 1, 1, 1, 2, 0], [0, 0, 0, 0, 0, 0]])
    mask = Unstructured(0.5).mask(scores)
    assert mask.tolist() == [[True, True, False, False, True, False], [True, True, True, False, False, False]]


def test_a_mask_of_a_matrix_has_one_threshold_for_all_rows():
    scores = torch.tensor([[9.0, 8, 7, 6], [1, 2, 3, 4]])
    assert Unstructured(0.5).mask_of_matrices(scores, [np.arange(2)]).tolist() == [[True] * 4, [False] * 4]
    two = Unstructured(0.5).mask_of_matrices(torch.cat([scores, 100 + scores]), [np.array([0, 3]), np.array([1, 2])])
    assert two.tolist() == [[False] * 4, [False] * 4, [True] * 4, [True] * 4]
    assert Unstructured(0.5).mask(scores).tolist() == [[True, True, False, False], [False, False, True, True]]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_a_share_of_each_row_is_zero(sparsity):
    mask = Unstructured(sparsity).mask(torch.rand(7, 30))
    assert (~mask).sum(1).tolist() == [int(30 * sparsity)] * 7


def test_broken_groups_are_those_with_more_weights_than_the_pattern_allows():
    weight = torch.tensor([[1.0, 0, 2, 0, 1, 1, 1, 0], [0, 0, 0, -0.0, 1, 1, 1, 1]])
    assert broken_groups(weight, NofM(2, 4)) == 2
    assert broken_groups(weight, Unstructured(0.5)) == 0
