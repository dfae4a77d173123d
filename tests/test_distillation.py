"""The losses of embedding transfer against loops written from their equations."""

import math

import pytest
import torch

from proxy_anchor import distillation, loss_registry
from proxy_anchor.distillation import PKT, RKD, RelaxedContrastive

LOSSES = [RelaxedContrastive(), RelaxedContrastive(sigma=0.5, delta=1.5), RKD(), PKT()]
NAMES = ["relaxed", "relaxed with other settings", "RKD", "PKT"]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=NAMES)


def test_names_of_the_flag():
    assert tuple(distillation.LOSSES) == loss_registry.TRANSFER_LOSSES


def embeddings(n=7, d=3, teacher=5, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, d, dtype=torch.double), 3 * torch.randn(n, teacher, dtype=torch.double)


def value_and_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    return value.detach(), student.grad


def distance(a, b):
    return math.sqrt(sum((s - t) ** 2 for s, t in zip(a, b)))


def unit(rows):
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]


def relaxed_contrastive(student, teacher, sigma, delta):
    """The value and its gradient by hand, which flows through the row means."""
    x, u = student.tolist(), unit(teacher.tolist())
    n, value, gradient = len(x), 0.0, torch.zeros_like(student)
    for i in range(n):
        d = [distance(x[i], x[k]) for k in range(n)]
        m = sum(d) / n
        w = [math.exp(-(distance(u[i], u[k]) ** 2) / sigma) for k in range(n)]
        r = [d[k] / m for k in range(n)]
        others = [j for j in range(n) if j != i]
        value += sum(w[j] * r[j] ** 2 + (1 - w[j]) * max(delta - r[j], 0) ** 2 for j in others) / n
        g = [2 * w[j] * r[j] - 2 * (1 - w[j]) * max(delta - r[j], 0) for j in range(n)]
        through_mean = sum(g[k] * d[k] for k in others) / (n * m**2)
        for j in others:
            slope = (g[j] / m - through_mean) / n  # dL/dd_ij
            step = slope * (student[i] - student[j]) / d[j]
            gradient[i] += step
            gradient[j] -= step
    return value, gradient


def smooth_l1(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def rkd(student, teacher):
    n = len(student)
    d, cosine = [], []
    for x in (student.tolist(), unit(teacher.tolist())):
        pairs = [[distance(a, b) for b in x] for a in x]
        mean = sum(map(sum, pairs)) / (n * (n - 1))
        d.append([[value / mean for value in row] for row in pairs])
        e = [
            [[(p - q) / pairs[i][j] if i != j else 0.0 for p, q in zip(x[j], x[i])] for j in range(n)] for i in range(n)
        ]
        cosine.append(
            [[[sum(p * q for p, q in zip(e[i][j], e[i][k])) for k in range(n)] for j in range(n)] for i in range(n)]
        )
    pairs = [(i, j) for i in range(n) for j in range(n)]
    of_distances = sum(smooth_l1(d[0][i][j] - d[1][i][j]) for i, j in pairs) / n**2
    of_angles = sum(smooth_l1(cosine[0][i][j][k] - cosine[1][i][j][k]) for i, j in pairs for k in range(n)) / n**3
    return of_distances + 2 * of_angles


def pkt(student, teacher):
    n, shares = len(student), []
    for x in (student.tolist(), unit(teacher.tolist())):
        x = [[p / (math.sqrt(sum(q * q for q in row)) + 1e-7) for p in row] for row in x]
        k = [[(sum(p * q for p, q in zip(a, b)) + 1) / 2 for b in x] for a in x]
        shares.append([[value / sum(row) for value in row] for row in k])
    pairs = [(i, j) for i in range(n) for j in range(n)]
    p, q = shares
    return sum(q[i][j] * math.log((q[i][j] + 1e-7) / (p[i][j] + 1e-7)) for i, j in pairs) / n**2


@pytest.mark.parametrize("sigma, delta", [(1.0, 1.0), (0.3, 1.0), (1.0, 1.7), (2.5, 0.4)])
@pytest.mark.parametrize("seed", range(3))
def test_relaxed_contrastive_is_the_equation(sigma, delta, seed):
    student, teacher = embeddings(seed=seed)
    value, gradient = value_and_gradient(RelaxedContrastive(sigma, delta), student, teacher)
    expected, by_hand = relaxed_contrastive(student, teacher, sigma, delta)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss, equation", [(RKD(), rkd), (PKT(), pkt)])
@pytest.mark.parametrize("seed", range(3))
def test_rivals_are_their_equations(loss, equation, seed):
    student, teacher = embeddings(seed=seed)
    assert loss(student, teacher).item() == pytest.approx(equation(student, teacher), rel=1e-9)


@every_loss
def test_gradient_is_that_of_the_value(loss):
    student, teacher = embeddings()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student.requires_grad_())


@every_loss
def test_permuted_rows_and_longer_teachers_change_nothing(loss):
    student, teacher = embeddings()
    value, gradient = value_and_gradient(loss, student, teacher)
    order = torch.randperm(len(student))
    permuted, permuted_gradient = value_and_gradient(loss, student[order], teacher[order])
    torch.testing.assert_close(permuted, value)
    torch.testing.assert_close(permuted_gradient, gradient[order])
    lengths = torch.rand(len(teacher), 1, dtype=torch.double) + 0.1
    torch.testing.assert_close(loss(student, lengths * teacher), value)


@pytest.mark.parametrize("loss", LOSSES[:3], ids=NAMES[:3])
def test_scale_and_place_of_the_student_change_nothing(loss):
    student, teacher = embeddings()
    value, gradient = value_and_gradient(loss, student, teacher)
    torch.testing.assert_close(loss(7.5 * student + torch.tensor([3.0, -2.0, 10.0]), teacher), value)
    zero = torch.zeros(3, dtype=torch.double)
    torch.testing.assert_close(gradient.sum(dim=0), zero)
    torch.testing.assert_close((student * gradient).sum(), zero[0])


def test_student_like_the_teacher_is_best_for_the_rivals():
    _, teacher = embeddings()
    for loss in (RKD(), PKT()):
        value, gradient = value_and_gradient(loss, torch.nn.functional.normalize(teacher), teacher)
        assert abs(value) < 1e-12 and gradient.abs().max() < 1e-6


def test_equal_students():
    """r_ij = n / (n - 1) for all pairs, and nothing to follow."""
    _, teacher = embeddings()
    n = len(teacher)
    u = torch.nn.functional.normalize(teacher)
    w = torch.exp(-torch.cdist(u, u).square())
    value, gradient = value_and_gradient(RelaxedContrastive(), torch.ones(n, 3, dtype=torch.double), teacher)
    r = n / (n - 1)
    assert value.item() == pytest.approx((w.sum() - n).item() * r**2 / n)  # beyond delta: the hinge is 0
    assert not gradient.any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_are_finite(loss, dtype):
    """Both views of an image may be equal, and all images of a batch: of the student, the teacher or both."""
    student, teacher = (x.to(dtype) for x in embeddings())
    for s, t in [
        (student[[0, 0, 1, 1]], teacher[:4]),
        (student[:4], teacher[[0, 0, 1, 1]]),
        (student[[0] * 4], teacher[:4]),
        (student[[0] * 4], teacher[[0] * 4]),
        (0 * student, teacher),
        (student, 0 * teacher),
    ]:
        value, gradient = value_and_gradient(loss, s, t)
        assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 1e7


def test_gradient_flows_through_the_mean():
    student, teacher = embeddings(n=24, d=8)
    _, gradient = value_and_gradient(RelaxedContrastive(), student, teacher)

    def detached(x):
        d = torch.cdist(x, x)
        r = d / d.mean(dim=1, keepdim=True).detach()
        u = torch.nn.functional.normalize(teacher)
        w = torch.exp(-torch.cdist(u, u).square())
        return ((w * r**2 + (1 - w) * torch.relu(1 - r) ** 2).sum() / len(x)).backward()

    other = student.clone().requires_grad_()
    detached(other)
    assert other.grad.norm() > 2 * gradient.norm()


@every_loss
def test_half_precision_is_computed_with_in_float32(loss):
    student, teacher = (x.bfloat16() for x in embeddings(n=20, d=8))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-5, abs=1e-8)


@every_loss
def test_no_gradient_reaches_the_teacher(loss):
    student, teacher = embeddings()
    loss(student.requires_grad_(), teacher.requires_grad_()).backward()
    assert teacher.grad is None and student.grad.any()


@every_loss
@pytest.mark.parametrize(
    "shapes", [((4, 3), (5, 3)), ((4,), (4, 3)), ((4, 3), (4,)), ((1, 3), (1, 3)), ((0, 3), (0, 3))]
)
def test_other_shapes_are_refused(loss, shapes):
    with pytest.raises(ValueError, match="Expected embeddings"):
        loss(*(torch.zeros(shape) for shape in shapes))
