/* samples/worlds/maze.c - the simulator of maze.h: layout, motion, pictures, and the walks of the training clips.
 *
 * Method   A ray per column of samples walks the cells (Amanatides and Woo 1987) to the one wall it can see; the
 *          samples of the column are then wall, floor or ceiling by their height. Balls are spheres met in closed form
 *          and compared in depth. Detail finer than a pixel is faded to its mean by what a pixel covers.
 * Units    Cells and frames. "Depth" is distance along the view direction, so a ray is forward + sx right + sy up times
 *          depth; sx and sy are slopes. Colours are display values, 0..1.
 * Pitfall  The order in which maze_init draws random numbers is part of the world of a seed. */
#include "maze.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#define UNIT 16777216.0 /* 2^24: steps of the position grid in a cell */

/* ---- random numbers ---------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t key, count;
} random_stream;

/* The splitmix64 finaliser: every input bit reaches every output bit. */
static uint64_t scramble(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static random_stream stream_make(uint64_t seed, uint64_t purpose) {
    return (random_stream){.key = scramble(scramble(seed + 0x9e3779b97f4a7c15u) + purpose)};
}

/* Uniform in 0..num-1. */
static int draw(random_stream *r, int num) {
    uint64_t bits = scramble(r->key + 0x9e3779b97f4a7c15u * ++r->count);
    return (int)(((bits >> 32) * (uint64_t)num) >> 32);
}

static bool draw_percent(random_stream *r, int percent) {
    return draw(r, 100) < percent;
}

/* Uniform in lo..hi. */
static int draw_range(random_stream *r, int lo, int hi) {
    return lo + draw(r, hi - lo + 1);
}

/* ---- directions -------------------------------------------------------------------------------------------------- */

/* cos(k * 7.5 degrees) * 2^24, rounded, over a quarter turn. */
static int cos_units(int heading) {
    static const int quarter[13] = {16777216, 16633685, 16205546, 15500126, 14529495, 13310260, 11863283,
                                    10213322, 8388608,  6420363,  4342263,  2189866,  0};
    int k = heading % MAZE_HEADINGS;
    if (k > MAZE_HEADINGS / 2) k = MAZE_HEADINGS - k;
    return k <= 12 ? quarter[k] : -quarter[24 - k];
}

static int sin_units(int heading) {
    return cos_units(heading + 3 * MAZE_HEADINGS / 4);
}

/* `units` of cos_units times num / den, to the nearest unit, halves away from zero. */
static double scaled_units(int units, int num, int den) {
    int64_t n = (int64_t)(units < 0 ? -units : units) * num;
    double magnitude = (double)((n + den / 2) / den) / UNIT;
    return units < 0 ? -magnitude : magnitude;
}

/* Any integer to 0..MAZE_HEADINGS-1. */
static int wrap_heading(int heading) {
    int k = heading % MAZE_HEADINGS;
    return k < 0 ? k + MAZE_HEADINGS : k;
}

/* ---- layout ------------------------------------------------------------------------------------------------------ */

static bool is_wall(const maze_world *w, int x, int y) {
    return x < 0 || y < 0 || x >= MAZE_SIDE || y >= MAZE_SIDE || w->wall[y][x] != 0;
}

static int walls_beside(const maze_world *w, int x, int y) {
    return is_wall(w, x - 1, y) + is_wall(w, x + 1, y) + is_wall(w, x, y - 1) + is_wall(w, x, y + 1);
}

/* A depth-first spanning tree over the odd cells. */
static void carve_tree(maze_world *w, random_stream *r) {
    enum { LATTICE = MAZE_SIDE / 2 };
    static const int step_x[4] = {2, 0, -2, 0}, step_y[4] = {0, 2, 0, -2};
    int stack_x[LATTICE * LATTICE], stack_y[LATTICE * LATTICE], depth = 1;
    stack_x[0] = 1 + 2 * draw(r, LATTICE);
    stack_y[0] = 1 + 2 * draw(r, LATTICE);
    w->wall[stack_y[0]][stack_x[0]] = 0;
    while (depth > 0) {
        int x = stack_x[depth - 1], y = stack_y[depth - 1], choices[4], num_choices = 0;
        for (int i = 0; i < 4; i++) {
            int nx = x + step_x[i], ny = y + step_y[i];
            if (nx > 0 && ny > 0 && nx < MAZE_SIDE - 1 && ny < MAZE_SIDE - 1 && w->wall[ny][nx]) {
                choices[num_choices++] = i;
            }
        }
        if (num_choices == 0) {
            depth--;
            continue;
        }
        int i = choices[draw(r, num_choices)];
        w->wall[y + step_y[i] / 2][x + step_x[i] / 2] = 0;
        stack_x[depth] = x + step_x[i];
        stack_y[depth] = y + step_y[i];
        w->wall[stack_y[depth]][stack_x[depth]] = 0;
        depth++;
    }
}

static void make_layout(maze_world *w, random_stream *r) {
    memset(w->wall, 1, sizeof w->wall);
    carve_tree(w, r);
    for (int y = 1; y < MAZE_SIDE - 1; y++)
        for (int x = 1; x < MAZE_SIDE - 1; x++)
            if ((x + y) % 2 == 1 && w->wall[y][x] && draw_percent(r, 40)) w->wall[y][x] = 0;
    for (int rooms = draw_range(r, 1, 2); rooms > 0; rooms--) {
        int x0 = 1 + 2 * draw(r, 3), y0 = 1 + 2 * draw(r, 3);
        for (int y = y0; y < y0 + 3; y++)
            for (int x = x0; x < x0 + 3; x++) w->wall[y][x] = 0;
    }
    for (int y = 2; y < MAZE_SIDE - 1; y += 2)
        for (int x = 2; x < MAZE_SIDE - 1; x += 2)
            if (w->wall[y][x] && walls_beside(w, x, y) == 0 && draw_percent(r, 50)) w->wall[y][x] = 0;
}

/* Every wall cell takes the kind of the nearest of four sites, one in each quarter of the map. */
static void choose_textures(maze_world *w, random_stream *r) {
    int kinds[MAZE_NUM_TEXTURES], site_x[4], site_y[4];
    for (int i = 0; i < MAZE_NUM_TEXTURES; i++) kinds[i] = i;
    for (int i = MAZE_NUM_TEXTURES - 1; i > 0; i--) {
        int j = draw(r, i + 1), swapped = kinds[i];
        kinds[i] = kinds[j];
        kinds[j] = swapped;
    }
    for (int i = 0; i < 4; i++) {
        site_x[i] = draw_range(r, 1, 3) + (i % 2) * 4;
        site_y[i] = draw_range(r, 1, 3) + (i / 2) * 4;
    }
    for (int y = 0; y < MAZE_SIDE; y++)
        for (int x = 0; x < MAZE_SIDE; x++) {
            int best = 0, best_distance = 1 << 20;
            for (int i = 0; i < 4; i++) {
                int distance = (x - site_x[i]) * (x - site_x[i]) + (y - site_y[i]) * (y - site_y[i]);
                if (distance < best_distance) {
                    best = i;
                    best_distance = distance;
                }
            }
            if (w->wall[y][x]) w->wall[y][x] = (uint8_t)(1 + kinds[best]);
        }
}

static void random_open_cell(const maze_world *w, random_stream *r, int *x, int *y) {
    do {
        *x = draw_range(r, 1, MAZE_SIDE - 2);
        *y = draw_range(r, 1, MAZE_SIDE - 2);
    } while (w->wall[*y][*x]);
}

/* ---- rays -------------------------------------------------------------------------------------------------------- */

typedef struct {
    double distance; /* in lengths of the ray's direction */
    double along;    /* 0..1 over the face of the cell, left to right as seen */
    int side;        /* of the wall cell: 0 +x, 1 -x, 2 +y, 3 -y */
    int texture;
} wall_hit;

/* From an open point: the border makes every ray end. */
static wall_hit cast_ray(const maze_world *w, double x, double y, double dx, double dy) {
    const double never = 1e30;
    int cell_x = (int)x, cell_y = (int)y;
    int step_x = dx > 0 ? 1 : -1, step_y = dy > 0 ? 1 : -1;
    double per_x = dx != 0 ? fabs(1 / dx) : never, per_y = dy != 0 ? fabs(1 / dy) : never;
    double next_x = dx != 0 ? (dx > 0 ? cell_x + 1 - x : x - cell_x) * per_x : never;
    double next_y = dy != 0 ? (dy > 0 ? cell_y + 1 - y : y - cell_y) * per_y : never;
    wall_hit hit;
    for (;;) {
        if (next_x < next_y) {
            cell_x += step_x;
            hit.distance = next_x;
            hit.side = dx > 0 ? 1 : 0;
            next_x += per_x;
        } else {
            cell_y += step_y;
            hit.distance = next_y;
            hit.side = dy > 0 ? 3 : 2;
            next_y += per_y;
        }
        if (is_wall(w, cell_x, cell_y)) break;
    }
    double at = hit.side < 2 ? y + hit.distance * dy - cell_y : x + hit.distance * dx - cell_x;
    bool mirrored = hit.side == 1 || hit.side == 2;
    at = at < 0 ? 0 : at > 1 ? 1 : at;
    hit.along = mirrored ? 1 - at : at;
    bool inside = cell_x >= 0 && cell_y >= 0 && cell_x < MAZE_SIDE && cell_y < MAZE_SIDE;
    hit.texture = inside ? w->wall[cell_y][cell_x] - 1 : 0;
    return hit;
}

/* Cells of open floor from the walker's centre in a direction. */
static double open_ahead(const maze_world *w, int heading) {
    int k = wrap_heading(heading);
    return cast_ray(w, w->x, w->y, cos_units(k) / UNIT, sin_units(k) / UNIT).distance;
}

/* ---- motion ------------------------------------------------------------------------------------------------------ */

/* Whether a circle reaches into a wall cell. Exact: coordinates are multiples of 2^-24 and the differences below 2. */
static bool touches_wall(const maze_world *w, double x, double y, double radius) {
    int cell_x = (int)x, cell_y = (int)y;
    for (int cy = cell_y - 1; cy <= cell_y + 1; cy++)
        for (int cx = cell_x - 1; cx <= cell_x + 1; cx++) {
            if (!is_wall(w, cx, cy)) continue;
            double dx = x < cx ? cx - x : x > cx + 1 ? x - (cx + 1) : 0;
            double dy = y < cy ? cy - y : y > cy + 1 ? y - (cy + 1) : 0;
            if (dx * dx + dy * dy < radius * radius) return true;
        }
    return false;
}

/* The end of a move along one axis: `to` if free, else against the face of the wall ahead if that is the obstacle and
 * leaves the circle free, else `from` (the corner of a cell beside the path). */
static double slide_axis(const maze_world *w, double from, double to, double other, bool is_x, bool *blocked) {
    if (to == from || !touches_wall(w, is_x ? to : other, is_x ? other : to, MAZE_RADIUS)) return to;
    *blocked = true;
    double against = to > from ? floor(from) + 1 - MAZE_RADIUS : floor(from) + MAZE_RADIUS;
    bool on_the_way = to > from ? against >= from && against < to : against <= from && against > to;
    if (on_the_way && !touches_wall(w, is_x ? against : other, is_x ? other : against, MAZE_RADIUS)) return against;
    return from;
}

static void move_walker(maze_world *w, int heading) {
    int k = wrap_heading(heading);
    const int per_cell = (int)(1 / MAZE_MOVE);
    double x = w->x + scaled_units(cos_units(k), 1, per_cell), y = w->y + scaled_units(sin_units(k), 1, per_cell);
    w->x = slide_axis(w, w->x, x, w->y, true, &w->blocked);
    w->y = slide_axis(w, w->y, y, w->x, false, &w->blocked);
}

/* A bounce takes the frame of its axis: the speed turns, the place stays. */
static void roll_balls(maze_world *w) {
    for (int i = 0; i < w->num_balls; i++) {
        maze_ball *b = &w->balls[i];
        if (touches_wall(w, b->x + b->vx, b->y, MAZE_BALL_RADIUS))
            b->vx = -b->vx;
        else
            b->x += b->vx;
        if (touches_wall(w, b->x, b->y + b->vy, MAZE_BALL_RADIUS))
            b->vy = -b->vy;
        else
            b->y += b->vy;
    }
}

static void add_balls(maze_world *w, random_stream *r) {
    w->num_balls = draw_percent(r, 50) ? 0 : draw_range(r, 1, MAZE_MAX_BALLS);
    int first_color = draw(r, 4);
    for (int i = 0; i < w->num_balls; i++) {
        maze_ball *b = &w->balls[i];
        int x, y, heading = draw(r, MAZE_HEADINGS), speed = draw_range(r, 30, 50); /* thousandths of a cell a frame */
        random_open_cell(w, r, &x, &y);
        b->x = x + 0.5;
        b->y = y + 0.5;
        b->vx = scaled_units(cos_units(heading), speed, 1000);
        b->vy = scaled_units(sin_units(heading), speed, 1000);
        b->color = (uint8_t)((first_color + i * draw_range(r, 1, 3)) % 4);
    }
}

void maze_init(maze_world *world, uint64_t seed) {
    random_stream r = stream_make(seed, 1);
    memset(world, 0, sizeof *world);
    world->seed = seed;
    make_layout(world, &r);
    choose_textures(world, &r);
    add_balls(world, &r);

    int x, y, best = 0;
    random_open_cell(world, &r, &x, &y);
    world->x = x + 0.5;
    world->y = y + 0.5;
    for (int i = 1; i < 4; i++)
        if (open_ahead(world, i * 12) > open_ahead(world, best * 12)) best = i;
    int aside = draw_percent(&r, 50) ? 0 : draw_range(&r, -2, 2);
    world->heading = wrap_heading(best * 12 + aside);
}

void maze_step(maze_world *world, int action) {
    int h = world->heading;
    world->blocked = false;
    switch (action) {
    case MAZE_FORWARD: move_walker(world, h); break;
    case MAZE_BACK: move_walker(world, h + MAZE_HEADINGS / 2); break;
    case MAZE_LEFT: world->heading = wrap_heading(h + 1); break;
    case MAZE_RIGHT: world->heading = wrap_heading(h - 1); break;
    case MAZE_STRAFE_LEFT: move_walker(world, h + MAZE_HEADINGS / 4); break;
    case MAZE_STRAFE_RIGHT: move_walker(world, h - MAZE_HEADINGS / 4); break;
    default: break;
    }
    roll_balls(world);
    world->time++;
}

const char *maze_action_name(int action) {
    static const char *const names[MAZE_NUM_ACTIONS] = {"none",  "forward",     "back",        "left",
                                                        "right", "strafe-left", "strafe-right"};
    return action >= 0 && action < MAZE_NUM_ACTIONS ? names[action] : NULL;
}

/* ---- pictures ---------------------------------------------------------------------------------------------------- */

typedef struct {
    float r, g, b;
} color;

static color mix(color a, color b, float t) {
    return (color){a.r + (b.r - a.r) * t, a.g + (b.g - a.g) * t, a.b + (b.b - a.b) * t};
}

static color dim(color a, float s) {
    return (color){a.r * s, a.g * s, a.b * s};
}

static const color FOG = {0.16f, 0.18f, 0.24f};
static const color FLOOR_A = {0.56f, 0.51f, 0.46f}, FLOOR_B = {0.45f, 0.41f, 0.38f};
static const color CEILING = {0.52f, 0.60f, 0.72f};

static const color BALL_COLORS[4] = {
    {1.00f, 0.36f, 0.08f}, {0.10f, 0.90f, 0.92f}, {0.98f, 0.20f, 0.62f}, {0.70f, 0.95f, 0.12f}};

enum { BRICKS, STRIPES, PANELS, DISCS, BLOCKS, DIAMONDS };

static const struct {
    color ground, figure;
    float figure_share; /* mean of wall_pattern over a cell */
} WALLS[MAZE_NUM_TEXTURES] = {
    [BRICKS] = {{0.82f, 0.36f, 0.27f}, {0.62f, 0.24f, 0.19f}, 0.5f},
    [STRIPES] = {{0.38f, 0.70f, 0.38f}, {0.23f, 0.50f, 0.27f}, 0.5f},
    [PANELS] = {{0.33f, 0.52f, 0.90f}, {0.20f, 0.34f, 0.68f}, 0.36f},
    [DISCS] = {{0.95f, 0.78f, 0.32f}, {0.76f, 0.52f, 0.15f}, 0.28f},
    [BLOCKS] = {{0.88f, 0.88f, 0.86f}, {0.64f, 0.66f, 0.69f}, 0.5f},
    [DIAMONDS] = {{0.74f, 0.48f, 0.84f}, {0.50f, 0.26f, 0.62f}, 0.32f},
};

/* Light of the four sides of a cell, in the order of wall_hit.side. */
static const float SIDE_LIGHT[4] = {0.80f, 0.74f, 1.00f, 0.93f};

/* 1 where the figure of a texture is, else 0; u and v are 0..1 over the face, v = 0 at the floor. */
static float wall_pattern(int texture, float u, float v) {
    switch (texture) {
    case BRICKS: {
        int row = (int)(v * 4);
        return (float)(((int)(u * 2 + 0.5f * (float)(row & 1)) + (row >> 1)) & 1);
    }
    case STRIPES: return (float)((int)(u * 8 + 0.5f) & 1);
    case PANELS: return fabsf(u - 0.5f) < 0.3f && fabsf(v - 0.5f) < 0.3f;
    case DISCS: return (u - 0.5f) * (u - 0.5f) + (v - 0.5f) * (v - 0.5f) < 0.09f;
    case BLOCKS: return (float)(((int)(u * 2) + (int)(v * 2)) & 1);
    default: return fabsf(u - 0.5f) + fabsf(v - 0.5f) < 0.4f;
    }
}

typedef struct {
    double slope;   /* of the column, to the right */
    double dx, dy;  /* its ray on the map, for depth 1 */
    double stretch; /* squared length of that ray */
    double depth;   /* of the wall */
    float along, detail, line, light, clear;
    int texture;
} view_column;

typedef struct {
    double right, up, depth;           /* of the centre, from the eye */
    double min_x, max_x, min_y, max_y; /* slopes that bound it on the screen */
    double x, y;                       /* on the map, for the shadow */
    color tint;
} view_ball;

typedef struct {
    const maze_world *world;
    double forward_x, forward_y, slope_x, slope_y; /* slopes at the right and the upper edge */
    double pixel;                                  /* slope of one pixel */
    double light_right, light_up, light_depth;     /* the lamp of the balls, seen by the eye */
    int num_balls;
    view_ball balls[MAZE_MAX_BALLS];
} view;

/* Share of a colour that is left after a distance, given squared: the rest is fog. */
static float clearness(double squared) {
    return (float)(1 / (1 + squared / 25));
}

/* Contrast left to detail of which a pixel covers `cells`: 1 where pixels are small, 0 where they cover about 0.4 of a cell. */
static float detail_left(double cells) {
    double t = 1.3 - 3.5 * cells;
    return (float)(t < 0 ? 0 : t > 1 ? 1 : t);
}

static view view_make(const maze_world *w, int width, int height) {
    view v = {.world = w, .forward_x = cos_units(w->heading) / UNIT, .forward_y = sin_units(w->heading) / UNIT};
    v.slope_x = tan(MAZE_FOV / 2);
    v.slope_y = v.slope_x * height / width;
    v.pixel = 2 * v.slope_x / width;
    const double lamp_x = 0.36, lamp_y = 0.48, lamp_up = 0.80; /* a unit vector */
    v.light_right = lamp_x * v.forward_y - lamp_y * v.forward_x;
    v.light_depth = lamp_x * v.forward_x + lamp_y * v.forward_y;
    v.light_up = lamp_up;
    for (int i = 0; i < w->num_balls; i++) {
        double x = w->balls[i].x - w->x, y = w->balls[i].y - w->y;
        view_ball b = {.right = x * v.forward_y - y * v.forward_x,
                       .depth = x * v.forward_x + y * v.forward_y,
                       .up = MAZE_BALL_RADIUS - 0.5,
                       .x = w->balls[i].x,
                       .y = w->balls[i].y,
                       .tint = BALL_COLORS[w->balls[i].color & 3]};
        /* The screen box of the cube round the ball: each face is widest at its near or its far edge. */
        double near = b.depth - MAZE_BALL_RADIUS, far = b.depth + MAZE_BALL_RADIUS;
        if (far <= 0) continue;
        if (near < 0.05) near = 0.05;
        double left = b.right - MAZE_BALL_RADIUS, right = b.right + MAZE_BALL_RADIUS;
        b.min_x = left / (left > 0 ? far : near);
        b.max_x = right / (right > 0 ? near : far);
        b.min_y = -0.5 / near;
        b.max_y = (2 * MAZE_BALL_RADIUS - 0.5) / far;
        v.balls[v.num_balls++] = b;
    }
    return v;
}

static view_column column_make(const view *v, double slope) {
    view_column c = {.slope = slope};
    c.dx = v->forward_x + slope * v->forward_y;
    c.dy = v->forward_y - slope * v->forward_x;
    c.stretch = c.dx * c.dx + c.dy * c.dy;
    wall_hit hit = cast_ray(v->world, v->world->x, v->world->y, c.dx, c.dy);
    c.depth = hit.distance;
    c.along = (float)hit.along;
    c.texture = hit.texture;
    c.light = SIDE_LIGHT[hit.side];
    c.clear = clearness(hit.distance * hit.distance * c.stretch);
    /* d(along) / d(slope) is depth over the ray's component into the wall: a slanted view covers more of it. */
    double into = fabs(hit.side < 2 ? c.dx : c.dy);
    double covers = hit.distance * v->pixel / (into > 1e-6 ? into : 1e-6);
    c.detail = detail_left(covers);
    /* The line of a cell's border, never thinner than a third of a pixel but weaker instead. */
    double width = 0.03, from_border = hit.along < 0.5 ? hit.along : 1 - hit.along;
    double drawn = covers / 3 > width ? covers / 3 : width;
    c.line = from_border < drawn ? (float)(0.55 * width / drawn) : 0;
    return c;
}

static color wall_color(const view_column *c, double slope) {
    float v = (float)(0.5 + c->depth * slope);
    float share = WALLS[c->texture].figure_share;
    float figure = share;
    if (c->detail > 0) figure += (wall_pattern(c->texture, c->along, v) - share) * c->detail;
    color base = mix(WALLS[c->texture].ground, WALLS[c->texture].figure, figure);
    if (v < 0.10f) base = dim(WALLS[c->texture].figure, 0.55f);
    if (v > 0.93f) base = mix(WALLS[c->texture].ground, (color){1, 1, 1}, 0.35f);
    base = dim(base, c->light * (1 - c->line));
    return mix(FOG, base, c->clear);
}

static color floor_color(const view *v, const view_column *c, double depth) {
    double x = v->world->x + depth * c->dx, y = v->world->y + depth * c->dy;
    float detail =
        detail_left(depth * depth * v->pixel); /* a row covers depth^2 * pixel / eye height; a cell is half the
                                                              checker's period */
    float odd = (float)(((int)x + (int)y) & 1);
    color base = mix(FLOOR_A, FLOOR_B, 0.5f + (odd - 0.5f) * detail);
    for (int i = 0; i < v->num_balls; i++) {
        double bx = x - v->balls[i].x, by = y - v->balls[i].y;
        float off = (float)((bx * bx + by * by) / (1.6 * MAZE_BALL_RADIUS * MAZE_BALL_RADIUS));
        if (off < 1) base = dim(base, 1 - 0.6f * (1 - off));
    }
    return mix(FOG, base, clearness(depth * depth * c->stretch));
}

/* The ball over a sample, if there is one nearer than `depth`. */
static void ball_over(const view *v, const view_column *c, double slope, double depth, color *out) {
    for (int i = 0; i < v->num_balls; i++) {
        const view_ball *b = &v->balls[i];
        if (c->slope < b->min_x || c->slope > b->max_x || slope < b->min_y || slope > b->max_y) continue;
        double aa = c->slope * c->slope + slope * slope + 1;
        double half_b = c->slope * b->right + slope * b->up + b->depth;
        double cc = b->right * b->right + b->up * b->up + b->depth * b->depth - MAZE_BALL_RADIUS * MAZE_BALL_RADIUS;
        double root = half_b * half_b - aa * cc;
        if (root <= 0) continue;
        double t = (half_b - sqrt(root)) / aa;
        if (t <= 0 || t >= depth) continue;
        depth = t;
        double facing = ((t * c->slope - b->right) * v->light_right + (t * slope - b->up) * v->light_up +
                         (t - b->depth) * v->light_depth) /
                        MAZE_BALL_RADIUS;
        float lit = facing > 0 ? (float)facing : 0, spot = lit * lit;
        spot *= spot;
        spot *= spot;
        spot *= spot;
        color base = mix(dim(b->tint, 0.45f + 0.55f * lit), (color){1, 1, 1}, 0.7f * spot);
        *out = mix(FOG, base, clearness(t * t * c->stretch));
    }
}

static color sample_color(const view *v, const view_column *c, double slope) {
    double height = 0.5 / (fabs(slope) > 1e-9 ? fabs(slope) : 1e-9); /* depth at which the ray meets floor or ceiling */
    color out;
    if (height >= c->depth)
        out = wall_color(c, slope);
    else if (slope < 0)
        out = floor_color(v, c, height);
    else
        out = mix(FOG, CEILING, clearness(1.8 * height * height));
    if (v->num_balls > 0) ball_over(v, c, slope, height < c->depth ? height + 1e-9 : c->depth, &out);
    return out;
}

static uint8_t to_byte(float sum, float scale) {
    float value = sum * scale + 0.5f;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

static bool sizes_make_sense(int width, int height, int samples) {
    return width >= 1 && height >= 1 && width <= MAZE_MAX_SIZE && height <= MAZE_MAX_SIZE && samples >= 1 &&
           samples <= MAZE_MAX_SAMPLES;
}

void maze_render(const maze_world *world, int width, int height, int samples, uint8_t *rgb) {
    if (!sizes_make_sense(width, height, samples)) return;
    view v = view_make(world, width, height);
    const float scale = 255.0f / (float)(samples * samples);
    for (int px = 0; px < width; px++) {
        view_column columns[MAZE_MAX_SAMPLES];
        for (int i = 0; i < samples; i++)
            columns[i] = column_make(&v, ((2 * (px * samples + i) + 1) / ((double)width * samples) - 1) * v.slope_x);
        for (int py = 0; py < height; py++) {
            color sum = {0, 0, 0};
            for (int j = 0; j < samples; j++) {
                double slope = (1 - (2 * (py * samples + j) + 1) / ((double)height * samples)) * v.slope_y;
                for (int i = 0; i < samples; i++) {
                    color one = sample_color(&v, &columns[i], slope);
                    sum = (color){sum.r + one.r, sum.g + one.g, sum.b + one.b};
                }
            }
            uint8_t *out = rgb + 3 * ((size_t)py * (size_t)width + (size_t)px);
            out[0] = to_byte(sum.r, scale);
            out[1] = to_byte(sum.g, scale);
            out[2] = to_byte(sum.b, scale);
        }
    }
}

/* ---- walks ------------------------------------------------------------------------------------------------------- */

typedef struct {
    random_stream random;
    struct {
        int action, frames;
    } plan[3]; /* held actions, the next one last */
    int num_plan;
} walk;

static void plan_add(walk *k, int action, int frames) {
    if (frames <= 0 || k->num_plan == 3) return;
    k->plan[k->num_plan].action = action;
    k->plan[k->num_plan++].frames = frames;
}

/* Turns, positive to the left, to the nearest heading that has open floor and no better neighbour, mostly on the more
 * open side. */
static int turns_to_open(const maze_world *w, random_stream *r) {
    double left = 0, right = 0;
    for (int i = 4; i <= 16; i += 4) {
        left += open_ahead(w, w->heading + i);
        right += open_ahead(w, w->heading - i);
    }
    int sign = left > right ? 1 : -1;
    if (draw_percent(r, 15)) sign = -sign;
    for (int i = 2; i < MAZE_HEADINGS / 2; i++) {
        double here = open_ahead(w, w->heading + sign * i);
        if (here > 1.6 && here >= open_ahead(w, w->heading + sign * (i + 1))) return sign * i;
    }
    return sign * MAZE_HEADINGS / 2;
}

/* The turns, at most 4, to the longest view near the heading: how a corridor is followed. */
static int turns_to_align(const maze_world *w) {
    int best = 0;
    for (int i = -4; i <= 4; i++)
        if (open_ahead(w, w->heading + i) > open_ahead(w, w->heading + best) + 0.2) best = i;
    return best;
}

static void plan_turn(walk *k, int turns) {
    plan_add(k, turns > 0 ? MAZE_LEFT : MAZE_RIGHT, turns > 0 ? turns : -turns);
}

/* Chooses the next held actions. Plans are stacks: the last one added is done first. */
static void plan_next(walk *k, const maze_world *w) {
    random_stream *r = &k->random;
    double ahead = open_ahead(w, w->heading);
    k->num_plan = 0;
    if (ahead < 0.6) { /* at a wall */
        int p = draw(r, 100);
        if (p < 12)
            plan_add(k, MAZE_FORWARD, draw_range(r, 3, 8));
        else if (p < 20)
            plan_add(k, MAZE_BACK, draw_range(r, 4, 12));
        else {
            plan_add(k, MAZE_FORWARD, draw_range(r, 3, 12));
            plan_turn(k, turns_to_open(w, r));
        }
        return;
    }
    int p = draw(r, 100);
    if (p < 38) {
        plan_add(k, MAZE_FORWARD, draw_range(r, 4, 12));
        plan_turn(k, turns_to_align(w));
    } else if (p < 46) {
        plan_add(k, MAZE_FORWARD, draw_range(r, 2, 8));
    } else if (p < 58) { /* look aside and back */
        int turns = draw_range(r, 3, 12), way = draw(r, 2) ? turns : -turns;
        plan_turn(k, -way);
        if (draw_percent(r, 30)) plan_add(k, MAZE_NONE, draw_range(r, 2, 4));
        plan_turn(k, way);
    } else if (p < 66) {
        plan_add(k, MAZE_FORWARD, draw_range(r, 2, 8));
        plan_turn(k, turns_to_open(w, r));
    } else if (p < 72) {
        int turns = draw_range(r, 2, 12);
        plan_turn(k, draw(r, 2) ? turns : -turns);
    } else if (p < 79) {
        plan_add(k, MAZE_BACK, draw_range(r, 2, 10));
    } else if (p < 91) {
        plan_add(k, draw(r, 2) ? MAZE_STRAFE_LEFT : MAZE_STRAFE_RIGHT, draw_range(r, 2, 8));
    } else {
        plan_add(k, MAZE_NONE, draw_range(r, 2, 8));
    }
}

/* The next action of a training walk. Actions are held for 2 to 12 frames: forward along the open way most often (about
 * 40 %), turns (40 %, many of them there and back), steps back and aside (5 and 8 %), rests (5 %). A wall mostly ends a push
 * against it at once, but not always, so that "a wall stops the walk" is in the data. */
static int next_action(walk *k, const maze_world *w) {
    if (k->num_plan > 0) {
        int action = k->plan[k->num_plan - 1].action;
        bool moving = action != MAZE_NONE && action != MAZE_LEFT && action != MAZE_RIGHT;
        bool facing = action != MAZE_FORWARD || open_ahead(w, w->heading) < 0.6;
        if (moving && w->blocked && facing && draw_percent(&k->random, 40)) k->num_plan = 0;
    }
    while (k->num_plan == 0) plan_next(k, w);
    int action = k->plan[k->num_plan - 1].action;
    if (--k->plan[k->num_plan - 1].frames == 0) k->num_plan--;
    return action;
}

/* A random pose with clearance, and the balls somewhere on their way. */
static void start_walk(maze_world *w, random_stream *r) {
    int x, y;
    for (int i = draw(r, 400); i > 0; i--) maze_step(w, MAZE_NONE);
    random_open_cell(w, r, &x, &y);
    w->x = x + MAZE_RADIUS + draw(r, (int)(UNIT * (1 - 2 * MAZE_RADIUS)) + 1) / UNIT;
    w->y = y + MAZE_RADIUS + draw(r, (int)(UNIT * (1 - 2 * MAZE_RADIUS)) + 1) / UNIT;
    w->heading = draw(r, MAZE_HEADINGS);
    if (open_ahead(w, w->heading) < 1 && draw_percent(r, 70))
        w->heading = wrap_heading(w->heading + turns_to_open(w, r));
    w->time = 0;
}

int maze_clips(uint8_t *frames, uint8_t *actions, uint64_t seed, uint64_t first, int clips, int length, int width,
               int height, int samples) {
    if (!frames || !actions || clips < 1 || length < 1 || !sizes_make_sense(width, height, samples)) return -1;
    const size_t frame_bytes = 3 * (size_t)width * (size_t)height;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
    for (int i = 0; i < clips; i++) {
        uint64_t number = scramble(seed + 0x632be59bd9b4e019u) + first + (uint64_t)i;
        maze_world world;
        walk k = {.random = stream_make(number, 2)};
        maze_init(&world, number);
        start_walk(&world, &k.random);
        for (int f = 0; f < length; f++) {
            size_t at = (size_t)i * (size_t)length + (size_t)f;
            int action = f == 0 ? MAZE_NONE : next_action(&k, &world);
            if (f > 0) maze_step(&world, action);
            actions[at] = (uint8_t)action;
            maze_render(&world, width, height, samples, frames + at * frame_bytes);
        }
    }
    return 0;
}
