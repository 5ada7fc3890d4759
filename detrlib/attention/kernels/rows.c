// Entmax of rows on a CPU, each read while it lies in the cache, and what has a threshold likewise; the mathematics is
// that of newton.py, normmax.py and budget.py, where it is explained, and the names are the same. Compiled by native.py.
//
// Legend: K keys of a row, z = (alpha - 1) (x - max x), c = 1 / (alpha - 1), u = (1 + z - s)_+, weights u^c.
// Most keys of a row have no weight. They are passed over block by block: what is left is copied side by side, worked on
// in one loop that the compiler turns into vector instructions, and copied back.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16 // keys
#define COARSE_STEPS 3
#define MOST_STEPS 60

static inline float as_float(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline int32_t as_bits(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }

// log2 of u > 0, whose d = u - 1 may be known better than u tells: u = m 2^e with m in [sqrt(1/2), sqrt(2)), and
// log m = 2 artanh((m - 1) / (m + 1)) as a series. Where e is 0, m - 1 is d.
static inline float log_2(float u, float d) {
    int32_t bits = (int32_t)((uint32_t)as_bits(u) - 0x3f3504f3); // of sqrt(1/2); u <= 0, of no weight, may wrap around
    int32_t e = bits >> 23;
    float m = as_float((bits & 0x7fffff) + 0x3f3504f3);
    float t = (e ? m - 1 : d) / (m + 1), v = t * t;
    float sum = (((v * (1.0f / 9) + 1.0f / 7) * v + 1.0f / 5) * v + 1.0f / 3) * v;
    return (float)e + 2.88539008f * (t + t * sum); // 2 log2(e)
}

// 2^y for y from -126, below which it is that of -126, to 126: 2^n, and a series for the rest of y. Above, as of keys
// without weight, anything.
static inline float exp_2(float y) {
    y = y < -126 ? -126 : y;
    float shifted = y + 0x1.8p23f, f = (y - (shifted - 0x1.8p23f)) * 0.693147181f;
    float sum = ((((f * (1.0f / 5040) + 1.0f / 720) * f + 1.0f / 120) * f + 1.0f / 24) * f + 1.0f / 6) * f + 1.0f / 2;
    sum = (sum * f + 1) * f + 1;
    return as_float((int32_t)((uint32_t)as_bits(sum) + ((uint32_t)as_bits(shifted) << 23)));
}

// How far a Newton's step goes from s, for n keys z.
static double newton_step(const float *restrict z, long n, float s, double c) {
    float total = 0, w = 0, power = c - 1;
    if (c == 1) {
#pragma omp simd reduction(+ : total, w)
        for (long i = 0; i < n; i++) {
            float u = 1 + (z[i] - s);
            w += u > 0 ? 1 : 0;
            total += u > 0 ? u : 0;
        }
        return (total - 1.0) / w;
    }
    if (c == 2) {
#pragma omp simd reduction(+ : total, w)
        for (long i = 0; i < n; i++) {
            float u = 1 + (z[i] - s);
            u = u > 0 ? u : 0;
            w += u;
            total += u * u;
        }
        return (total - sqrt(total)) / w;
    }
#pragma omp simd reduction(+ : total, w)
    for (long i = 0; i < n; i++) {
        float d = z[i] - s, u = 1 + d, lower = exp_2(power * log_2(u, d));
        lower = u > 0 ? lower : 0;
        w += lower;
        total += lower + lower * d;
    }
    return -total * expm1(log(total) / -c) / w;
}

// The root s, approached from `s` on its left. As `_root` in newton.py.
static float root(const float *z, long n, float s, double c, int most) {
    double tolerance = c < 2 ? 5e-7 : 3e-5;
    for (int done = 0; done < most; done++) {
        double step = newton_step(z, n, s, c);
        s += step;
        if (!(c * step > tolerance)) break;
    }
    return s;
}

// Turns z into u^c; their sum.
static float weigh(float *restrict z, long n, float s, double c) {
    float total = 0, power = c;
    if (c == 1 || c == 2) {
#pragma omp simd reduction(+ : total)
        for (long i = 0; i < n; i++) {
            float u = 1 + (z[i] - s);
            u = u > 0 ? u : 0;
            total += z[i] = power == 1 ? u : u * u;
        }
        return total;
    }
#pragma omp simd reduction(+ : total)
    for (long i = 0; i < n; i++) {
        float d = z[i] - s, u = 1 + d, weight = exp_2(power * log_2(u, d));
        total += z[i] = u > 0 ? weight : 0;
    }
    return total;
}

// z of a score; -2, where no key has weight, in place of what lies below: 0 times -inf would not be 0.
static inline float scaled(float x, float top, float beyond) {
    float z = beyond * (x - top);
    return z > -2 ? z : -2;
}

// The number of keys in block b of a row.
static inline int size_of(long b, long K) { return b < K / BLOCK ? BLOCK : K % BLOCK; }

// The largest score of a row and, into tops, of each of its blocks. Where a row has no weights, p becomes what is no
// number, as of a softmax, and so is the result.
static float largest(const float *restrict x, float *restrict p, long K, float *restrict tops) {
    long blocks = (K + BLOCK - 1) / BLOCK;
    float top = -INFINITY;
    int wrong = 0;
    for (long b = 0; b < blocks; b++) {
        const float *of_block = x + b * BLOCK;
        float most = -INFINITY;
        int size = size_of(b, K);
#pragma omp simd reduction(max : most) reduction(| : wrong)
        for (int i = 0; i < size; i++) {
            most = of_block[i] > most ? of_block[i] : most;
            wrong |= of_block[i] != of_block[i];
        }
        tops[b] = most;
        top = most > top ? most : top;
    }
    if (!wrong && isfinite(top)) return top;
    for (long i = 0; i < K; i++) p[i] = NAN;
    return NAN;
}

// Weights u^out of z = beyond (x - max x), with s such that u^c sums to one; then they are made to do so.
static void entmax_row(const float *restrict x, float *restrict p, long K, float beyond, double c, double out,
                       float *restrict tops, float *restrict z) {
    long blocks = (K + BLOCK - 1) / BLOCK, n = 0;
    float top = largest(x, p, K, tops), s = 0;
    if (isnan(top)) return;
    if (blocks > 1) { // the root for some keys is left of that for all
        for (long b = 0; b < blocks; b++) z[b] = scaled(tops[b], top, beyond);
        s = root(z, blocks, s, c, COARSE_STEPS);
    }
    float least = top + (s - 1) / beyond - 1e-6f * (fabsf(top) + 1 / beyond); // rounding must not lose a key
    for (long b = 0; b < blocks; b++) {
        if (tops[b] < least) continue;
        int size = size_of(b, K);
        for (int i = 0; i < size; i++) z[n + i] = scaled(x[b * BLOCK + i], top, beyond);
        for (int i = size; i < BLOCK; i++) z[n + i] = -2;
        n += BLOCK;
    }
    s = root(z, n, s, c, MOST_STEPS);
    float total = weigh(z, n, s, out);
    total = 1 / total; // what rounding has left is put right
    for (long b = 0; b < blocks; b++) {
        int size = size_of(b, K);
        int left_out = tops[b] < least;
        for (int i = 0; i < size; i++) p[b * BLOCK + i] = left_out ? 0 : z[i] * total;
        z += left_out ? 0 : BLOCK;
    }
}

// tau such that clip(z - tau, 0, 1) sums to the budget; -INFINITY if keys are too few for it. See budget.py.
static float budget_tau(const float *restrict z, long n, double budget) {
    float limit = INFINITY; // keys above it are those of C
    for (;;) {
        float most = -INFINITY, whole = 0;
#pragma omp simd reduction(max : most) reduction(+ : whole)
        for (long i = 0; i < n; i++) {
            whole += z[i] > limit ? 1 : 0;
            most = z[i] <= limit && z[i] > most ? z[i] : most;
        }
        double left = budget - whole;
        if (left <= 0 || most == -INFINITY) return most; // nothing is left for the others, or there are none
        float tau = most - left; // from here on Newton's steps go up to the root
        for (int done = 0; done < MOST_STEPS; done++) {
            float total = 0, w = 0;
#pragma omp simd reduction(+ : total, w)
            for (long i = 0; i < n; i++) {
                float above = z[i] <= limit ? z[i] - tau : 0;
                w += above > 0 ? 1 : 0;
                total += above > 0 ? above : 0;
            }
            if (w == 0) break; // what is left is less than numbers as large as these can tell
            float step = (total - left) / w;
            tau += step; // the last one back, by what rounding went too far
            if (!(step > 0)) break;
        }
        if (most - tau <= 1) return tau;
        limit = fminf(tau + 1, nextafterf(most, -INFINITY)); // one key more at least, whatever rounding does
    }
}

static void budget_row(const float *restrict x, float *restrict p, long K, double budget, float *restrict tops,
                       float *restrict z) {
    long blocks = (K + BLOCK - 1) / BLOCK, n = 0;
    float top = largest(x, p, K, tops), least = -INFINITY;
    if (isnan(top)) return;
    if (blocks > 1) { // tau of some keys lies below that of all
        for (long b = 0; b < blocks; b++) z[b] = tops[b] - top;
        least = top + budget_tau(z, blocks, budget) - 1e-6f * (fabsf(top) + 1);
    }
    for (long b = 0; b < blocks; b++) {
        if (tops[b] < least) continue;
        int size = size_of(b, K);
        for (int i = 0; i < size; i++) z[n + i] = x[b * BLOCK + i] - top;
        n += size;
    }
    float tau = budget_tau(z, n, budget);
    for (long i = 0; i < K; i++) {
        float weight = x[i] - top - tau; // no number where both are -INFINITY
        p[i] = weight > 0 ? (weight < 1 ? weight : 1) : 0;
    }
}

// s = p^power, and 0 or no number where p is.
static void take_powers(const float *restrict p, float *restrict s, long n, float power) {
    if (power == 0) {
        for (long i = 0; i < n; i++) s[i] = p[i] > 0 ? 1 : p[i];
    } else if (power == 0.5f) {
        for (long i = 0; i < n; i++) s[i] = sqrtf(p[i]);
    } else {
        for (long i = 0; i < n; i++) {
            float own = exp_2(power * log_2(p[i], p[i] - 1));
            s[i] = p[i] > 0 ? own : p[i];
        }
    }
}

// sum p (m - g) (p^(1 - alpha) - 1 + (alpha - 1) log p) / (alpha - 1)^2. With y = (1 - alpha) log p >= 0 the last factor is
// exp(y) - 1 - y, which for small y would be all rounding if it were not summed as a series.
static float alpha_slope(const float *restrict p, const float *restrict g, long n, float mean, double beyond) {
    float slope = 0, scale = -beyond;
#pragma omp simd reduction(+ : slope)
    for (long i = 0; i < n; i++) {
        float log2_q = scale * log_2(p[i], p[i] - 1), y = log2_q * 0.693147181f;
        float series = (((y * (1.0f / 5040) + 1.0f / 720) * y + 1.0f / 120) * y + 1.0f / 24) * y + 1.0f / 6;
        series = y * y * (series * y + 0.5f);
        float term = p[i] * (mean - g[i]) * (y < 0.5f ? series : exp_2(log2_q) - 1 - y);
        slope += p[i] > 0 ? term : 0;
    }
    return slope / (beyond * beyond);
}

static void gradient_row(const float *restrict p, const float *restrict g, float *restrict to_scores,
                         float *restrict to_alpha, long K, double alpha, float *restrict tops, float *restrict q,
                         float *restrict h, float *restrict s) {
    long blocks = (K + BLOCK - 1) / BLOCK, n = 0;
    for (long b = 0; b < blocks; b++) {
        int size = size_of(b, K), any = 0;
#pragma omp simd reduction(| : any)
        for (int i = 0; i < size; i++) any |= !(p[b * BLOCK + i] <= 0); // not a number, too
        tops[b] = any;
        if (!any) continue;
        for (int i = 0; i < size; i++) q[n + i] = p[b * BLOCK + i], h[n + i] = g[b * BLOCK + i];
        for (int i = size; i < BLOCK; i++) q[n + i] = h[n + i] = 0;
        n += BLOCK;
    }
    take_powers(q, s, n, 2 - alpha);
    float sum = 0, mean = 0;
#pragma omp simd reduction(+ : sum, mean)
    for (long i = 0; i < n; i++) {
        sum += s[i];
        mean += s[i] * h[i];
    }
    mean = n ? mean / sum : 0;
    if (to_alpha) *to_alpha = alpha_slope(q, h, n, mean, alpha - 1);
    for (long b = 0; b < blocks; b++) {
        int size = size_of(b, K), left_out = tops[b] == 0;
        for (int i = 0; i < size; i++) to_scores[b * BLOCK + i] = left_out ? 0 : s[i] * (h[i] - mean);
        if (!left_out) s += BLOCK, h += BLOCK;
    }
}

// Weights p [R,K] of scores x [R,K]; alpha [R] or, with stride 0, [1]. Not zero: there is no memory.
int entmax_rows(const float *x, float *p, const double *alpha, long stride, long R, long K) {
    float *room = malloc(2 * (K + BLOCK) * sizeof *room);
    if (!room) return 1;
    for (long r = 0; r < R; r++) {
        double beyond = alpha[r * stride] - 1;
        entmax_row(x + r * K, p + r * K, K, beyond, 1 / beyond, 1 / beyond, room, room + K + BLOCK);
    }
    free(room);
    return 0;
}

// The same of normmax.
int normmax_rows(const float *x, float *p, const double *alpha, long stride, long R, long K) {
    float *room = malloc(2 * (K + BLOCK) * sizeof *room);
    if (!room) return 1;
    for (long r = 0; r < R; r++) {
        double c = 1 / (alpha[r * stride] - 1);
        entmax_row(x + r * K, p + r * K, K, 1, c + 1, c, room, room + K + BLOCK);
    }
    free(room);
    return 0;
}

// The same of budgets [R] or [1].
int budget_rows(const float *x, float *p, const double *budget, long stride, long R, long K) {
    float *room = malloc(2 * (K + BLOCK) * sizeof *room);
    if (!room) return 1;
    for (long r = 0; r < R; r++) budget_row(x + r * K, p + r * K, K, budget[r * stride], room, room + K + BLOCK);
    free(room);
    return 0;
}

// Gradients of scores [R,K] and, unless NULL, of alpha [R], from weights p and their gradient g [R,K].
int entmax_gradients(const float *p, const float *g, float *to_scores, float *to_alpha, const double *alpha, long stride,
                     long R, long K) {
    long part = K + BLOCK;
    float *room = malloc(4 * part * sizeof *room);
    if (!room) return 1;
    for (long r = 0; r < R; r++)
        gradient_row(p + r * K, g + r * K, to_scores + r * K, to_alpha ? to_alpha + r : NULL, K, alpha[r * stride], room,
                     room + part, room + 2 * part, room + 3 * part);
    free(room);
    return 0;
}
