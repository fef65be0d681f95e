"""A reference implementation of MT-AdamW: the published formula, one parameter and one step at a
time.
"""


def plain_step(theta, m, n, gradient, norm, probability, t, lr, betas, eps, decay, omega=1.0):
    b1, b2 = betas
    g = omega * gradient / norm
    m = b1 * m + (1 - b1) / probability * g
    n = b2 * n + (1 - b2) / probability * g * g
    m_hat, n_hat = m / (1 - b1**t), n / (1 - b2**t)
    return theta - lr * (m_hat / (n_hat.sqrt() + eps) + decay * theta), m, n
