/* caching/predict.c - predictors as weights of stored snapshots: Y(step) = sum_j w_j Y_j, j by age.
 *
 * With k = step - s_0 steps ahead of the newest snapshot at s_0 and gaps D_a = s_a - s_(a+1)
 *   Taylor     sum_i F^i k^i / i!, F^0 = Y, F^(i+1) = (F^i - F^i one snapshot before) / D
 *   Hermite    Y_0 + sum_i F^i / i! sigma^i H_i(sigma k), H physicists' Hermite polynomials
 *   Newton     the polynomial through the last order + 1 snapshots, exact for any gaps
 *   Chebyshev  ridge regression on T_0..T_M: w = B (B'B + lambda I)^-1 b(step)
 * Sources: TaylorSeer, arXiv 2503.06923; HiCache, arXiv 2508.16984; Spectrum, arXiv 2603.01623.
 * Pitfalls - TaylorSeer's recursion divides the difference of every order by the newest gap of that snapshot. It is no
 *            divided difference where gaps differ, and its order 2 is k^2/2, not k(k+D)/2: quadratics are missed by k D
 *            at order 2. Kept.
 *          - Ridge weights do not sum to 1 (0.88 to 0.94): they shrink what is predicted.
 * All in double, rounded to float once. */
#include <math.h>
#include <string.h>

#include "caching/policy.h"

#define MAX_ORDER  15
#define MAX_DEGREE 15

static int usable(int num_stored) {
    return num_stored < RF_CACHE_MAX_TERMS ? num_stored : RF_CACHE_MAX_TERMS;
}

static int usable_order(int order, int num_stored) {
    if (order > usable(num_stored) - 1) order = usable(num_stored) - 1;
    return order > MAX_ORDER ? MAX_ORDER : order;
}

static void round_weights(float *weights, const double *w, int num) {
    for (int j = 0; j < num; j++) weights[j] = (float)w[j];
}

int rf_predict_reuse(float *weights) {
    weights[0] = 1;
    return 1;
}

/* w[j] += sum_i factors[i] * (weight of Y_j in F^i of the newest snapshot), i = 0..order. */
static void add_differences(double *w, const int *stored, int order, const double *factors) {
    /* f[a][j]: weight of Y_j in F^i at age a, for the order i at hand */
    double f[MAX_ORDER + 1][MAX_ORDER + 1] = {{0}};
    for (int a = 0; a <= order; a++) f[a][a] = 1;
    for (int i = 0; i <= order; i++) {
        for (int j = 0; j <= order; j++) w[j] += factors[i] * f[0][j];
        for (int a = 0; a < order - i; a++) {
            double gap = (double)stored[a] - (double)stored[a + 1];
            for (int j = 0; j <= order; j++) f[a][j] = (f[a][j] - f[a + 1][j]) / gap;
        }
    }
}

int rf_predict_taylor(float *weights, const int *stored, int num_stored, int step, int order) {
    order = usable_order(order, num_stored);
    if (order < 0) return 0;
    double factors[MAX_ORDER + 1] = {1}, w[MAX_ORDER + 1] = {0}, k = (double)step - (double)stored[0];
    for (int i = 1; i <= order; i++) factors[i] = factors[i - 1] * k / i;
    add_differences(w, stored, order, factors);
    round_weights(weights, w, order + 1);
    return order + 1;
}

int rf_predict_hermite(float *weights, const int *stored, int num_stored, int step, int order, double sigma) {
    order = usable_order(order, num_stored);
    if (order < 0) return 0;
    double factors[MAX_ORDER + 1] = {1}, w[MAX_ORDER + 1] = {0};
    double x = sigma * ((double)step - (double)stored[0]);
    double h_before = 1, h = 2 * x, scale = 1; /* H_(i-1), H_i, sigma^i / i! */
    for (int i = 1; i <= order; i++) {
        scale *= sigma / i;
        factors[i] = scale * h;
        double h_next = 2 * x * h - 2 * i * h_before;
        h_before = h;
        h = h_next;
    }
    add_differences(w, stored, order, factors);
    round_weights(weights, w, order + 1);
    return order + 1;
}

int rf_predict_newton(float *weights, const int *stored, int num_stored, int step, int order) {
    order = usable_order(order, num_stored);
    if (order < 0) return 0;
    double w[MAX_ORDER + 1];
    for (int j = 0; j <= order; j++) {
        w[j] = 1;
        for (int m = 0; m <= order; m++) {
            if (m != j) w[j] *= ((double)step - stored[m]) / ((double)stored[j] - stored[m]);
        }
    }
    round_weights(weights, w, order + 1);
    return order + 1;
}

static void chebyshev_basis(double *t, double tau, int degree) {
    t[0] = 1;
    if (degree > 0) t[1] = tau;
    for (int i = 2; i <= degree; i++) t[i] = 2 * tau * t[i - 1] - t[i - 2];
}

/* Solves a x = b in place of b for a symmetric positive definite a (n x n, lower half is overwritten). */
static bool solve_cholesky(double (*a)[MAX_DEGREE + 1], double *b, int n) {
    for (int i = 0; i < n; i++) {
        for (int j = 0; j <= i; j++) {
            double sum = a[i][j];
            for (int m = 0; m < j; m++) sum -= a[i][m] * a[j][m];
            if (i == j && !(sum > 0)) return false;
            a[i][j] = i == j ? sqrt(sum) : sum / a[j][j];
        }
    }
    for (int i = 0; i < n; i++) {
        for (int m = 0; m < i; m++) b[i] -= a[i][m] * b[m];
        b[i] /= a[i][i];
    }
    for (int i = n - 1; i >= 0; i--) {
        for (int m = i + 1; m < n; m++) b[i] -= a[m][i] * b[m];
        b[i] /= a[i][i];
    }
    return true;
}

int rf_predict_chebyshev(float *weights, const int *stored, int num_stored, int step, int degree, double lambda,
                         double span, double blend) {
    int num = usable(num_stored);
    if (num < 1) return 0;
    if (degree > MAX_DEGREE) degree = MAX_DEGREE;
    if (!(lambda > 0) && degree > num - 1) degree = num - 1; /* else no single solution */
    double basis[RF_CACHE_MAX_TERMS][MAX_DEGREE + 1], a[MAX_DEGREE + 1][MAX_DEGREE + 1], x[MAX_DEGREE + 1];
    double w[RF_CACHE_MAX_TERMS] = {0};
    for (int j = 0; j < num; j++) chebyshev_basis(basis[j], 2 * stored[j] / span - 1, degree);
    chebyshev_basis(x, 2 * step / span - 1, degree);
    for (int p = 0; p <= degree; p++) {
        for (int q = 0; q <= p; q++) {
            a[p][q] = p == q ? lambda : 0;
            for (int j = 0; j < num; j++) a[p][q] += basis[j][p] * basis[j][q];
        }
    }
    if (!solve_cholesky(a, x, degree + 1)) blend = 0;
    for (int j = 0; j < num && blend != 0; j++) {
        double sum = 0;
        for (int p = 0; p <= degree; p++) sum += x[p] * basis[j][p];
        w[j] = blend * sum;
    }
    double slope = num > 1 ? ((double)step - stored[0]) / ((double)stored[0] - stored[1]) : 0;
    w[0] += (1 - blend) * (1 + slope);
    if (num > 1) w[1] -= (1 - blend) * slope;
    round_weights(weights, w, num);
    return num;
}
