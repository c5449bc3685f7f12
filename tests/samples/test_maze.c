/* tests/samples/test_maze.c - the maze world: layout, exact motion, walls and balls, pictures, training clips. */
#include "samples/worlds/maze.h"

#include "tests/test_util.h"

enum { SIZE = 64, SAMPLES = 3, FRAME = SIZE * SIZE * 3 };

static uint64_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static maze_world world_of(uint64_t seed) {
    maze_world w;
    maze_init(&w, seed);
    return w;
}

static maze_world world_without_balls(uint64_t seed) {
    maze_world w = world_of(seed);
    w.num_balls = 0;
    return w;
}

/* One room of red bricks, the walker at (x, y). */
static maze_world empty_room(double x, double y, int heading) {
    maze_world w = world_without_balls(1);
    for (int cy = 0; cy < MAZE_SIDE; cy++)
        for (int cx = 0; cx < MAZE_SIDE; cx++)
            w.wall[cy][cx] = cx == 0 || cy == 0 || cx == MAZE_SIDE - 1 || cy == MAZE_SIDE - 1;
    w.x = x;
    w.y = y;
    w.heading = heading;
    return w;
}

static void steps(maze_world *w, int action, int num) {
    for (int i = 0; i < num; i++) maze_step(w, action);
}

/* Squared distance of a point to the nearest wall cell. */
static double clearance_squared(const maze_world *w, double x, double y) {
    double best = 1e9;
    for (int cy = 0; cy < MAZE_SIDE; cy++)
        for (int cx = 0; cx < MAZE_SIDE; cx++) {
            if (!w->wall[cy][cx]) continue;
            double dx = fmax(fmax(cx - x, x - (cx + 1)), 0), dy = fmax(fmax(cy - y, y - (cy + 1)), 0);
            best = fmin(best, dx * dx + dy * dy);
        }
    return best;
}

static bool on_grid(double value) {
    double units = value * 16777216.0;
    return units == floor(units);
}

/* ---- layout ---- */

static int flood(const maze_world *w, bool seen[MAZE_SIDE][MAZE_SIDE], int x, int y) {
    if (w->wall[y][x] || seen[y][x]) return 0;
    seen[y][x] = true;
    return 1 + flood(w, seen, x + 1, y) + flood(w, seen, x - 1, y) + flood(w, seen, x, y + 1) +
           flood(w, seen, x, y - 1);
}

START_TEST(layouts_are_mazes) {
    static const int ahead_x[4] = {1, 0, -1, 0}, ahead_y[4] = {0, 1, 0, -1};
    enum { WORLDS = 400 };
    int with_balls = 0, open_cells = 0;
    for (uint64_t seed = 0; seed < WORLDS; seed++) {
        maze_world w = world_of(seed);
        bool seen[MAZE_SIDE][MAZE_SIDE] = {{false}};
        int num_open = 0, kinds = 0, used[MAZE_NUM_TEXTURES + 1] = {0};
        for (int y = 0; y < MAZE_SIDE; y++)
            for (int x = 0; x < MAZE_SIDE; x++) {
                bool border = x == 0 || y == 0 || x == MAZE_SIDE - 1 || y == MAZE_SIDE - 1;
                ck_assert(!border || w.wall[y][x]);
                ck_assert_int_le(w.wall[y][x], MAZE_NUM_TEXTURES);
                if (w.wall[y][x] && !used[w.wall[y][x]]++) kinds++;
                num_open += !w.wall[y][x];
            }
        int cell_x = (int)w.x, cell_y = (int)w.y, quarter = ((w.heading + 6) / 12) % 4;
        ck_assert_int_eq(flood(&w, seen, cell_x, cell_y), num_open);
        ck_assert(num_open > 31 && num_open < 49);
        ck_assert(kinds >= 2 && kinds <= 4);
        ck_assert(w.x == cell_x + 0.5 && w.y == cell_y + 0.5);
        ck_assert_int_eq(w.wall[cell_y + ahead_y[quarter]][cell_x + ahead_x[quarter]], 0);
        ck_assert_int_le(w.num_balls, MAZE_MAX_BALLS);
        if (w.num_balls == 2) ck_assert_int_ne(w.balls[0].color, w.balls[1].color);
        with_balls += w.num_balls > 0;
        open_cells += num_open;
    }
    ck_assert(with_balls > 160 && with_balls < 240);
    ck_assert(open_cells > 36 * WORLDS && open_cells < 46 * WORLDS);
}
END_TEST

START_TEST(a_seed_is_a_world) {
    static uint8_t a[FRAME], b[FRAME];
    for (uint64_t seed = 0; seed < 8; seed++) {
        maze_world first = world_of(seed), second = world_of(seed), other = world_of(seed + 1);
        uint64_t random = seed;
        for (int i = 0; i < 200; i++) {
            int action = (int)(next_random(&random) % MAZE_NUM_ACTIONS);
            maze_step(&first, action);
            maze_step(&second, action);
        }
        ck_assert(first.x == second.x && first.y == second.y && first.heading == second.heading);
        ck_assert_int_eq(first.time, 200);
        maze_render(&first, SIZE, SIZE, SAMPLES, a);
        maze_render(&second, SIZE, SIZE, SAMPLES, b);
        ck_assert_mem_eq(a, b, FRAME);
        ck_assert(memcmp(first.wall, other.wall, sizeof first.wall) != 0);
    }
}
END_TEST

/* ---- motion ---- */

START_TEST(turns_come_back) {
    static uint8_t before[FRAME], after[FRAME];
    for (uint64_t seed = 0; seed < 8; seed++) {
        maze_world w = world_without_balls(seed);
        int heading = w.heading;
        maze_render(&w, SIZE, SIZE, SAMPLES, before);
        steps(&w, MAZE_RIGHT, 8);
        maze_render(&w, SIZE, SIZE, SAMPLES, after);
        ck_assert_mem_ne(before, after, FRAME);
        steps(&w, MAZE_LEFT, 8);
        ck_assert_int_eq(w.heading, heading);
        maze_render(&w, SIZE, SIZE, SAMPLES, after);
        ck_assert_mem_eq(before, after, FRAME);
        for (int i = 0; i < MAZE_HEADINGS; i++) {
            maze_step(&w, MAZE_LEFT);
            ck_assert(w.heading >= 0 && w.heading < MAZE_HEADINGS && !w.blocked);
        }
        maze_render(&w, SIZE, SIZE, SAMPLES, after);
        ck_assert_mem_eq(before, after, FRAME);
    }
}
END_TEST

START_TEST(moves_come_back) {
    for (int heading = 0; heading < MAZE_HEADINGS; heading++) {
        maze_world w = empty_room(4.5, 4.5, heading);
        steps(&w, MAZE_FORWARD, 8);
        double angle = heading * MAZE_TURN;
        ck_assert_double_eq_tol(w.x, 4.5 + cos(angle), 1e-6);
        ck_assert_double_eq_tol(w.y, 4.5 + sin(angle), 1e-6);
        steps(&w, MAZE_STRAFE_LEFT, 8);
        ck_assert_double_eq_tol(w.x, 4.5 + cos(angle) - sin(angle), 1e-6);
        ck_assert_double_eq_tol(w.y, 4.5 + sin(angle) + cos(angle), 1e-6);
        steps(&w, MAZE_STRAFE_RIGHT, 8);
        steps(&w, MAZE_BACK, 8);
        ck_assert(w.x == 4.5 && w.y == 4.5 && !w.blocked);
    }
}
END_TEST

START_TEST(a_wall_stops_the_walk) {
    static uint8_t at_wall[FRAME], still[FRAME];
    maze_world w = empty_room(4.5, 4.5, 0);
    w.x = 4.4375; /* so that the last move before the wall is a short one */
    for (int i = 0; i < 26; i++) {
        maze_step(&w, MAZE_FORWARD);
        ck_assert(!w.blocked);
    }
    maze_step(&w, MAZE_FORWARD);
    ck_assert(w.blocked && w.x == MAZE_SIDE - 1 - MAZE_RADIUS && w.y == 4.5);
    maze_render(&w, SIZE, SIZE, SAMPLES, at_wall);
    for (int i = 0; i < 5; i++) {
        maze_step(&w, MAZE_FORWARD);
        ck_assert(w.blocked);
        maze_render(&w, SIZE, SIZE, SAMPLES, still);
        ck_assert_mem_eq(at_wall, still, FRAME);
    }
    maze_step(&w, MAZE_NONE);
    ck_assert(!w.blocked);
    maze_step(&w, MAZE_LEFT); /* at a slant: x is stopped, y slides */
    maze_step(&w, MAZE_FORWARD);
    ck_assert(w.blocked && w.x == MAZE_SIDE - 1 - MAZE_RADIUS);
    ck_assert_double_eq_tol(w.y, 4.5 + MAZE_MOVE * sin(MAZE_TURN), 1e-6);
    maze_step(&w, MAZE_BACK);
    ck_assert(!w.blocked && w.x < MAZE_SIDE - 1 - MAZE_RADIUS);
}
END_TEST

START_TEST(walls_hold_for_random_walks) {
    for (uint64_t seed = 0; seed < 10; seed++) {
        maze_world w = world_of(seed);
        uint64_t random = seed + 77;
        int action = MAZE_NONE, num_blocked = 0;
        for (int i = 0; i < 10000; i++) {
            if (next_random(&random) % 6 == 0) action = (int)(next_random(&random) % MAZE_NUM_ACTIONS);
            double x = w.x, y = w.y;
            maze_step(&w, action);
            double moved = hypot(w.x - x, w.y - y);
            bool moves = action != MAZE_NONE && action != MAZE_LEFT && action != MAZE_RIGHT;
            ck_assert_double_ge(clearance_squared(&w, w.x, w.y), MAZE_RADIUS * MAZE_RADIUS);
            ck_assert(on_grid(w.x) && on_grid(w.y));
            if (!moves)
                ck_assert(moved == 0 && !w.blocked);
            else if (w.blocked)
                ck_assert(moved < MAZE_MOVE + 1e-6);
            else
                ck_assert(fabs(moved - MAZE_MOVE) < 1e-6);
            num_blocked += w.blocked;
        }
        ck_assert_int_gt(num_blocked, 100);
    }
}
END_TEST

START_TEST(balls_keep_their_speed) {
    int num_balls = 0;
    for (uint64_t seed = 0; seed < 40; seed++) {
        maze_world w = world_of(seed), start = w;
        for (int i = 0; i < 2000; i++) {
            maze_world before = w;
            maze_step(&w, MAZE_NONE);
            for (int b = 0; b < w.num_balls; b++) {
                const maze_ball *ball = &w.balls[b], *was = &before.balls[b];
                ck_assert(fabs(ball->vx) == fabs(start.balls[b].vx) && fabs(ball->vy) == fabs(start.balls[b].vy));
                ck_assert(ball->x - was->x == (ball->vx == was->vx ? ball->vx : 0));
                ck_assert(ball->y - was->y == (ball->vy == was->vy ? ball->vy : 0));
                ck_assert_double_ge(clearance_squared(&w, ball->x, ball->y), MAZE_BALL_RADIUS * MAZE_BALL_RADIUS);
            }
        }
        ck_assert(w.x == start.x && w.y == start.y && w.heading == start.heading);
        for (int b = 0; b < w.num_balls; b++) {
            double speed = hypot(w.balls[b].vx, w.balls[b].vy);
            ck_assert(speed > 0.0299 && speed < 0.0501);
            num_balls++;
        }
    }
    ck_assert_int_gt(num_balls, 10);
}
END_TEST

START_TEST(actions_have_names) {
    static const char *const names[] = {"none", "forward", "back", "left", "right", "strafe-left", "strafe-right"};
    for (int i = 0; i < MAZE_NUM_ACTIONS; i++) ck_assert_str_eq(maze_action_name(i), names[i]);
    ck_assert_ptr_null(maze_action_name(-1));
    ck_assert_ptr_null(maze_action_name(MAZE_NUM_ACTIONS));

    maze_world w = world_of(3), start = w; /* an unknown action rests */
    maze_step(&w, MAZE_NUM_ACTIONS);
    maze_step(&w, -1);
    ck_assert(w.x == start.x && w.y == start.y && w.heading == start.heading && w.time == 2);
}
END_TEST

/* ---- pictures ---- */

static const uint8_t *pixel(const uint8_t *frame, int row, int column) {
    return frame + 3 * (row * SIZE + column);
}

START_TEST(a_wall_stands_where_it_should) {
    static uint8_t frame[FRAME];
    /* Two cells before a wall: its half height is a slope of 1/4, which is 11.4 of the 32 rows to tan(35 degrees). */
    for (int quarter = 0; quarter < 4; quarter++) {
        double away_x[4] = {6, 4.5, 3, 4.5}, away_y[4] = {4.5, 6, 4.5, 3};
        maze_world w = empty_room(away_x[quarter], away_y[quarter], quarter * 12);
        maze_render(&w, SIZE, SIZE, 1, frame);
        for (int column = 0; column < SIZE; column++)
            for (int row = 0; row < SIZE; row++) {
                const uint8_t *p = pixel(frame, row, column);
                if (row < 21)
                    ck_assert_int_gt(p[2], p[0]); /* ceiling, blue */
                else if (row < 43)
                    ck_assert_int_gt(p[0], p[2]); /* bricks, red */
                else
                    ck_assert(p[0] >= p[1] && p[1] >= p[2] && p[0] < 2 * p[2]); /* floor, almost grey */
            }
    }
}
END_TEST

START_TEST(a_ball_is_drawn_before_walls_only) {
    static uint8_t with[FRAME], without[FRAME];
    maze_world w = empty_room(4.5, 4.5, 0);
    maze_render(&w, SIZE, SIZE, SAMPLES, without);
    w.num_balls = 1;
    w.balls[0] = (maze_ball){.x = 6, .y = 4.5, .color = 1};
    maze_render(&w, SIZE, SIZE, SAMPLES, with);
    /* The centre of the ball is at a slope of (0.1875 - 0.5) / 1.5, 9.5 rows under the horizon. */
    const uint8_t *p = pixel(with, 41, 32);
    ck_assert(p[1] > 85 && p[2] > 85 && p[0] < p[1] / 2);
    int changed = 0;
    for (int i = 0; i < FRAME; i += 3) changed += memcmp(with + i, without + i, 3) != 0;
    ck_assert(changed > 60 && changed < 250); /* a disc of 11.5 pixels across, and its shadow */

    for (int y = 1; y < MAZE_SIDE - 1; y++) w.wall[y][5] = 1;
    maze_render(&w, SIZE, SIZE, SAMPLES, with);
    w.num_balls = 0;
    maze_render(&w, SIZE, SIZE, SAMPLES, without);
    ck_assert_mem_eq(with, without, FRAME);
    w.num_balls = 1;
    w.balls[0].x = 3; /* behind the walker */
    maze_render(&w, SIZE, SIZE, SAMPLES, with);
    ck_assert_mem_eq(with, without, FRAME);
}
END_TEST

START_TEST(samples_smooth_the_same_picture) {
    static uint8_t one[FRAME], many[FRAME];
    for (uint64_t seed = 0; seed < 10; seed++) {
        maze_world w = world_of(seed);
        maze_render(&w, SIZE, SIZE, 1, one);
        maze_render(&w, SIZE, SIZE, MAZE_MAX_SAMPLES, many);
        double sum = 0;
        for (int i = 0; i < FRAME; i++) sum += abs(one[i] - many[i]);
        ck_assert_double_lt(sum / FRAME, 6);
        ck_assert_mem_ne(one, many, FRAME);
    }
}
END_TEST

/* ---- clips ---- */

START_TEST(clips_do_not_depend_on_the_batch) {
    enum { CLIPS = 6, LENGTH = 10, SMALL = 16, BYTES = SMALL * SMALL * 3 * LENGTH };
    static uint8_t all[CLIPS][BYTES], actions[CLIPS][LENGTH], part[2][BYTES], part_actions[2][LENGTH];
    ck_assert_int_eq(maze_clips(all[0], actions[0], 5, 100, CLIPS, LENGTH, SMALL, SMALL, 2), 0);
    for (int i = 0; i < CLIPS; i += 2) {
        uint64_t first = 100 + (uint64_t)i;
        ck_assert_int_eq(maze_clips(part[0], part_actions[0], 5, first, 2, LENGTH, SMALL, SMALL, 2), 0);
        ck_assert_mem_eq(part, all[i], 2 * BYTES);
        ck_assert_mem_eq(part_actions, actions[i], 2 * LENGTH);
        ck_assert_mem_ne(all[i], all[i + 1], BYTES);
    }
    /* A longer clip starts like a shorter one; another seed is another walk. */
    ck_assert_int_eq(maze_clips(part[0], part_actions[0], 5, 100, 1, LENGTH / 2, SMALL, SMALL, 2), 0);
    ck_assert_mem_eq(part, all[0], BYTES / 2);
    ck_assert_int_eq(maze_clips(part[0], part_actions[0], 6, 100, 1, LENGTH, SMALL, SMALL, 2), 0);
    ck_assert_mem_ne(part, all[0], BYTES);
}
END_TEST

START_TEST(walks_are_mixtures) {
    enum { CLIPS = 500, LENGTH = 64 };
    static uint8_t frames[CLIPS * LENGTH * 3], actions[CLIPS][LENGTH];
    int count[MAZE_NUM_ACTIONS] = {0}, held = 0;
    const double total = CLIPS * (LENGTH - 1);
    ck_assert_int_eq(maze_clips(frames, actions[0], 1, 0, CLIPS, LENGTH, 1, 1, 1), 0);
    for (int c = 0; c < CLIPS; c++) {
        ck_assert_int_eq(actions[c][0], MAZE_NONE);
        for (int i = 1; i < LENGTH; i++) {
            ck_assert_int_lt(actions[c][i], MAZE_NUM_ACTIONS);
            count[actions[c][i]]++;
            held += actions[c][i] == actions[c][i - 1];
        }
    }
    int turns = count[MAZE_LEFT] + count[MAZE_RIGHT];
    ck_assert(count[MAZE_FORWARD] > 0.35 * total && count[MAZE_FORWARD] < 0.48 * total);
    ck_assert(turns > 0.32 * total && turns < 0.46 * total);
    ck_assert(abs(count[MAZE_LEFT] - count[MAZE_RIGHT]) < 0.15 * turns);
    ck_assert(count[MAZE_NONE] > 0.02 * total && count[MAZE_NONE] < 0.08 * total);
    ck_assert(count[MAZE_BACK] > 0.03 * total);
    ck_assert(count[MAZE_STRAFE_LEFT] > 0.02 * total && count[MAZE_STRAFE_RIGHT] > 0.02 * total);
    ck_assert(held > 0.7 * total);
}
END_TEST

START_TEST(bad_sizes_are_refused) {
    static const struct {
        int clips, length, width, height, samples;
    } bad[] = {{0, 1, 4, 4, 1},
               {-1, 1, 4, 4, 1},
               {1, 0, 4, 4, 1},
               {1, -1, 4, 4, 1},
               {1, 1, 0, 4, 1},
               {1, 1, 4, -4, 1},
               {1, 1, 4, 4, 0},
               {1, 1, 4, 4, MAZE_MAX_SAMPLES + 1},
               {1, 1, MAZE_MAX_SIZE + 1, 1, 1},
               {1, 1, 1, MAZE_MAX_SIZE + 1, 1}};
    uint8_t frames[4 * 4 * 3], kept[sizeof frames], actions[4] = {9, 9, 9, 9};
    memset(frames, 0xa5, sizeof frames);
    memset(kept, 0xa5, sizeof kept);
    maze_world w = world_of(0);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ck_assert_int_eq(
            maze_clips(frames, actions, 0, 0, bad[i].clips, bad[i].length, bad[i].width, bad[i].height, bad[i].samples),
            -1);
        if (i >= 4) maze_render(&w, bad[i].width, bad[i].height, bad[i].samples, frames);
        ck_assert_mem_eq(frames, kept, sizeof frames);
        ck_assert_int_eq(actions[0], 9);
    }
    ck_assert_int_eq(maze_clips(NULL, actions, 0, 0, 1, 1, 4, 4, 1), -1);
    ck_assert_int_eq(maze_clips(frames, NULL, 0, 0, 1, 1, 4, 4, 1), -1);
    ck_assert_int_eq(maze_clips(frames, actions, 0, 0, 1, 1, 4, 4, 1), 0);
    ck_assert_int_eq(actions[0], MAZE_NONE);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("maze");
    TCase *tc = tcase_create("maze");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, layouts_are_mazes);
    tcase_add_test(tc, a_seed_is_a_world);
    tcase_add_test(tc, turns_come_back);
    tcase_add_test(tc, moves_come_back);
    tcase_add_test(tc, a_wall_stops_the_walk);
    tcase_add_test(tc, walls_hold_for_random_walks);
    tcase_add_test(tc, balls_keep_their_speed);
    tcase_add_test(tc, actions_have_names);
    tcase_add_test(tc, a_wall_stands_where_it_should);
    tcase_add_test(tc, a_ball_is_drawn_before_walls_only);
    tcase_add_test(tc, samples_smooth_the_same_picture);
    tcase_add_test(tc, clips_do_not_depend_on_the_batch);
    tcase_add_test(tc, walks_are_mixtures);
    tcase_add_test(tc, bad_sizes_are_refused);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
