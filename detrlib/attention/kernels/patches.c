// The proximal step of total variation on a CPU, in single precision, and its gradient; the mathematics is that of
// tvmax.py, where it is explained. Compiled with rows.c by native.py.
//
// Legend: h, w the key grid; N = h w cells of a map, M maps. LANES maps are worked on side by side, in the cache, until
// each is done and gives its lane to the next one; those of a time have the same cells hidden. A lane is computed by
// itself, so that a map does not show which others were beside it.
//
// Flows are improved by overrelaxation: each edge in turn makes its ends equal and goes on by a part of that, within
// its limit. The edges of the 2 x 2 blocks from even rows and columns on are taken block by block, then those from odd
// ones on: these are all edges. So the grid has a frame of cells without flow, `W` wide, from which blocks stand out.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define SWEEPS 8 // between looks at how far flows still move
#define LOOK_ANYWAY 256 // sweeps after which the gap is computed however they move
#define MOST_SWEEPS 3072 // maps that still fall short of the tolerance are taken as they are
#define RESOLUTION 4e-6f // as in tvmax.py
#define WALL INT32_MAX // on labels: nothing passes

typedef struct {
    long h, w, H, W;
    float overrelaxed;             // half of the factor of a step
    float *most_right, *most_down; // [H W]: limits of the flow to the cell on the right, and below
    float *y, *x, *right, *down;   // [H W][LANES]: centred scores, x = y - D^T u, and the flows u
    float *means, *members;        // [H W][LANES]: of patches; their size
    int32_t *labels, *wall_right, *wall_down;
    double *totals; // [H W][LANES]: of patches, by label
    float tolerance[LANES], moved[LANES], gap[LANES];
    double centre[LANES];
    long map[LANES], sweeps[LANES]; // -1: none
} Room;

// The edges of a block. `moved` adds up the squares of what flows change by, if asked for.
static inline void relax_block(Room *room, long p, int measure) {
    long W = room->W, L = LANES;
    float *restrict a = room->x + p * L, *restrict b = a + L, *restrict c = a + W * L, *restrict d = c + L;
    float *restrict top = room->right + p * L, *restrict bottom = top + W * L;
    float *restrict left = room->down + p * L, *restrict other = left + L, *restrict moved = room->moved;
    float most_top = room->most_right[p], most_bottom = room->most_right[p + W];
    float most_left = room->most_down[p], most_other = room->most_down[p + 1], factor = room->overrelaxed;
#pragma omp simd
    for (int i = 0; i < LANES; i++) {
        float xa = a[i], xb = b[i], xc = c[i], xd = d[i], u, s1, s2, s3, s4;
#define RELAX(flow, most, from, to, step)                                                                              \
    u = flow[i] + factor * (from - to);                                                                                \
    u = u < most ? u : most;                                                                                           \
    u = u > -most ? u : -most;                                                                                         \
    step = u - flow[i];                                                                                                \
    flow[i] = u;                                                                                                       \
    from -= step;                                                                                                      \
    to += step;
        RELAX(top, most_top, xa, xb, s1)
        RELAX(bottom, most_bottom, xc, xd, s2)
        RELAX(left, most_left, xa, xc, s3)
        RELAX(other, most_other, xb, xd, s4)
#undef RELAX
        a[i] = xa, b[i] = xb, c[i] = xc, d[i] = xd;
        if (measure) moved[i] += (s1 * s1 + s2 * s2) + (s3 * s3 + s4 * s4);
    }
}

static inline void sweep(Room *room, int measure) {
    for (long start = 0; start < 2; start++)
        for (long r = start; r < room->H - start; r += 2)
            for (long c = start; c < room->W - start; c += 2) relax_block(room, r * room->W + c, measure);
}

// x = y - D^T u afresh: rounding would build up.
static void take_flows(Room *room) {
    long W = room->W * LANES;
    for (long r = 1; r <= room->h; r++) {
        long from = (r * room->W + 1) * LANES, to = from + room->w * LANES;
        float *restrict x = room->x;
        const float *y = room->y, *right = room->right, *down = room->down;
#pragma omp simd
        for (long p = from; p < to; p++) x[p] = y[p] - ((right[p] - right[p - LANES]) + (down[p] - down[p - W]));
    }
}

// Walls between cells that are not joined: full flows, unless the cells are tied all the same.
static void build_walls(Room *room) {
    long W = room->W * LANES;
    float tie[LANES];
    for (int i = 0; i < LANES; i++) tie[i] = room->tolerance[i] / sqrtf(room->h * room->w);
    for (long p = 0; p < room->W * (room->H - 1); p++) {
        float most_right = room->most_right[p], most_down = room->most_down[p];
        const float *x = room->x + p * LANES, *right = room->right + p * LANES, *down = room->down + p * LANES;
        int32_t *restrict wall_right = room->wall_right + p * LANES, *restrict wall_down = room->wall_down + p * LANES;
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            int level = (fabsf(right[i]) < most_right) | (fabsf(x[i] - x[i + LANES]) <= tie[i]);
            int upright = (fabsf(down[i]) < most_down) | (fabsf(x[i] - x[i + W]) <= tie[i]);
            wall_right[i] = level & (most_right > 0) ? 0 : WALL;
            wall_down[i] = upright & (most_down > 0) ? 0 : WALL;
        }
    }
}

// Takes on lower labels from two neighbours; whether there were any.
static inline int32_t lower(int32_t *restrict label, const int32_t *restrict level, const int32_t *restrict level_wall,
                            const int32_t *restrict upright, const int32_t *restrict upright_wall) {
    int32_t changed = 0;
#pragma omp simd reduction(| : changed)
    for (int i = 0; i < LANES; i++) {
        int32_t own = label[i], first = level[i] | level_wall[i], second = upright[i] | upright_wall[i];
        int32_t least = first < second ? first : second;
        least = own < least ? own : least;
        label[i] = least;
        changed |= own ^ least;
    }
    return changed;
}

// The least index of the cells that a cell is joined with: forth and back until there is no lower one.
static void label_patches(Room *room) {
    long h = room->h, w = room->w, W = room->W, L = LANES;
    int32_t *labels = room->labels, *wall_right = room->wall_right, *wall_down = room->wall_down, changed;
    for (long r = 1; r <= h; r++)
        for (long c = 1; c <= w; c++)
            for (int i = 0; i < LANES; i++) labels[(r * W + c) * L + i] = (r - 1) * w + c - 1;
    do {
        changed = 0;
        for (long r = 1; r <= h; r++)
            for (long p = (r * W + 1) * L; p < (r * W + 1 + w) * L; p += L)
                changed |= lower(labels + p, labels + p - L, wall_right + p - L, labels + p - W * L, wall_down + p - W * L);
        if (!changed) break;
        changed = 0;
        for (long r = h; r >= 1; r--)
            for (long p = (r * W + w) * L; p > r * W * L; p -= L)
                changed |= lower(labels + p, labels + p + L, wall_right + p, labels + p + W * L, wall_down + p);
    } while (changed);
}

static void take_means(Room *room) {
    long h = room->h, w = room->w, W = room->W, size = h * w * LANES;
    double *restrict totals = room->totals;
    float *restrict members = room->members;
    memset(totals, 0, size * sizeof *totals);
    memset(members, 0, size * sizeof *members);
    for (long r = 1; r <= h; r++)
        for (long p = (r * W + 1) * LANES; p < (r * W + 1 + w) * LANES; p += LANES)
            for (int i = 0; i < LANES; i++) {
                long at = (long)room->labels[p + i] * LANES + i;
                totals[at] += room->x[p + i];
                members[at] += 1;
            }
#pragma omp simd
    for (long at = 0; at < size; at++) members[at] = totals[at] / members[at]; // from here on their means
    for (long r = 1; r <= h; r++)
        for (long p = (r * W + 1) * LANES; p < (r * W + 1 + w) * LANES; p += LANES)
            for (int i = 0; i < LANES; i++) room->means[p + i] = members[(long)room->labels[p + i] * LANES + i];
}

static void take_gap(Room *room) {
    long W = room->W;
    float gap[LANES] = {0};
    for (long r = 1; r <= room->h; r++)
        for (long p = r * W + 1; p <= r * W + room->w; p++) {
            const float *x = room->x + p * LANES, *m = room->means + p * LANES, *below = m + W * LANES;
            const float *right = room->right + p * LANES, *down = room->down + p * LANES;
            float most_right = room->most_right[p], most_down = room->most_down[p];
#pragma omp simd
            for (int i = 0; i < LANES; i++) {
                float off = x[i] - m[i], level = m[i] - m[i + LANES], upright = m[i] - below[i];
                // Exactly zero where a flow is full, which a difference of two products need not be.
                float slack_right = most_right - (level < 0 ? -right[i] : right[i]);
                float slack_down = most_down - (upright < 0 ? -down[i] : down[i]);
                gap[i] += off * off / 2 + (slack_right * fabsf(level) + slack_down * fabsf(upright));
            }
        }
    memcpy(room->gap, gap, sizeof gap);
}

// Puts a map into a lane; NULL: nothing, which is never done and never in the way.
static void load(Room *room, int lane, const float *scores, const uint8_t *hidden, long map) {
    long h = room->h, w = room->w, W = room->W, seen = 0;
    double centre = 0, squares = 0;
    for (long k = 0; scores && k < h * w; k++)
        if (!hidden[k]) centre += scores[k], seen++;
    centre /= seen ? seen : 1;
    for (long p = 0; p < room->H * W; p++)
        for (int array = 0; array < 4; array++) room->y[(array * room->H * W + p) * LANES + lane] = 0;
    for (long r = 0; scores && r < h; r++)
        for (long c = 0; c < w; c++) {
            float y = hidden[r * w + c] ? 0 : scores[r * w + c] - centre;
            long p = ((r + 1) * W + c + 1) * LANES + lane;
            squares += (double)y * y;
            room->y[p] = room->x[p] = y;
        }
    room->tolerance[lane] = RESOLUTION * sqrt(squares);
    room->centre[lane] = centre;
    room->map[lane] = scores ? map : -1;
    room->sweeps[lane] = 0;
}

static void unload(const Room *room, int lane, const float *scores, const uint8_t *hidden, float *prox,
                   int32_t *patches) {
    for (long r = 0, k = 0; r < room->h; r++)
        for (long c = 0; c < room->w; c++, k++) {
            long p = ((r + 1) * room->W + c + 1) * LANES + lane;
            prox[k] = hidden[k] ? scores[k] : (float)(room->means[p] + room->centre[lane]);
            patches[k] = room->labels[p];
        }
}

// Limits of the flows between cells of which neither is hidden.
static void set_limits(Room *room, const uint8_t *hidden, float lam) {
    long h = room->h, w = room->w;
    for (long r = 0, k = 0; r < h; r++)
        for (long c = 0; c < w; c++, k++) {
            long p = (r + 1) * room->W + c + 1;
            room->most_right[p] = c + 1 < w && !hidden[k] && !hidden[k + 1] ? lam : 0;
            room->most_down[p] = r + 1 < h && !hidden[k] && !hidden[k + w] ? lam : 0;
        }
}

// Sweeps, and lanes of which the flows have come to rest: their gap is worth computing.
static int relax(Room *room, int *rests) {
    int any = 0;
    take_flows(room);
    for (int s = 1; s < SWEEPS; s++) sweep(room, 0);
    memset(room->moved, 0, sizeof room->moved);
    sweep(room, 1);
    for (int i = 0; i < LANES; i++) {
        room->sweeps[i] += SWEEPS;
        rests[i] = !(room->moved[i] > room->tolerance[i] * room->tolerance[i]) || room->sweeps[i] % LOOK_ANYWAY == 0;
        rests[i] &= room->map[i] >= 0;
        any |= rests[i];
    }
    return any;
}

// Maps that have the same cells hidden.
static void solve_alike(Room *room, const float *scores, const uint8_t *hidden, float *prox, int32_t *patches,
                        float *gap, long M) {
    long N = room->h * room->w, next = 0, left = M;
    int rests[LANES];
    for (int i = 0; i < LANES; i++, next++) load(room, i, next < M ? scores + next * N : NULL, hidden, next);
    while (left) {
        if (!relax(room, rests)) continue;
        take_flows(room);
        build_walls(room);
        label_patches(room);
        take_means(room);
        take_gap(room);
        for (int i = 0; i < LANES; i++) {
            int short_of_it = room->gap[i] > room->tolerance[i] * room->tolerance[i] / 2; // false for NaN
            if (!rests[i] || (short_of_it && room->sweeps[i] < MOST_SWEEPS)) continue;
            long map = room->map[i], at = map * N;
            unload(room, i, scores + at, hidden + at, prox + at, patches + at);
            gap[map] = room->gap[i];
            load(room, i, next < M ? scores + next * N : NULL, hidden, next);
            next++, left--;
        }
    }
}

// The proximal step of scores [M,h,w], labels of its patches [M,h w] and the duality gap [M]; hidden cells [M,h,w] stay
// what they are. Not zero: there is no memory.
int tv_prox(const float *scores, const uint8_t *hidden, float *prox, int32_t *patches, float *gap, double lam, long M,
            long h, long w) {
    long N = h * w, H = (h + 3) / 2 * 2, W = (w + 3) / 2 * 2, cells = H * W;
    long array = cells * LANES, bytes = (11 * array + (2 * cells + 15) / 16 * 16) * sizeof(float);
    float *room = aligned_alloc(64, bytes);
    if (!room) return 1;
    memset(room, 0, bytes);
    Room of = {.h = h, .w = w, .H = H, .W = W, .y = room, .x = room + array, .right = room + 2 * array};
    of.down = room + 3 * array, of.means = room + 4 * array, of.members = room + 5 * array;
    of.labels = (int32_t *)(room + 6 * array), of.wall_right = of.labels + array, of.wall_down = of.labels + 2 * array;
    of.totals = (double *)(room + 9 * array);
    of.most_right = room + 11 * array, of.most_down = of.most_right + cells;
    of.overrelaxed = 1 / (1 + sinf(3.14159265f / fmaxf(fmaxf(h, w), 2))); // the best one for a patch of that width
    for (long start = 0, end; start < M; start = end) {
        for (end = start + 1; end < M && !memcmp(hidden + start * N, hidden + end * N, N);) end++;
        set_limits(&of, hidden + start * N, lam);
        solve_alike(&of, scores + start * N, hidden + start * N, prox + start * N, patches + start * N, gap + start,
                    end - start);
    }
    free(room);
    return 0;
}

// The mean over its patch of each gradient [M,N]; that of hidden cells is zero.
int tv_prox_gradient(const float *gradient, const uint8_t *hidden, const int32_t *patches, float *to_scores, long M,
                     long N) {
    double *totals = malloc(2 * N * sizeof *totals), *members = totals + N;
    if (!totals) return 1;
    for (long at = 0; at < M * N; at += N) {
        memset(totals, 0, 2 * N * sizeof *totals);
        for (long k = at; k < at + N; k++) totals[patches[k]] += gradient[k], members[patches[k]]++;
        for (long k = 0; k < N; k++) totals[k] /= members[k];
        for (long k = at; k < at + N; k++) to_scores[k] = hidden[k] ? 0 : totals[patches[k]];
    }
    free(totals);
    return 0;
}
