/* samples/worlds/maze.h - a first-person walk through a maze of textured walls: the world of the shipped model.
 *
 * It makes the training data, it is the ground truth that `refrain world --compare-simulator` measures against, and it
 * draws the first frame of `--init SEED`. A world is one plain struct: copy it to branch a rollout. Needs libm only.
 *
 * Axes     x to the right, y up on the map, cells of side 1; headings count turns to the left, 0 = +x.
 * A step   one frame: a turn of MAZE_TURN radians, or a move of MAZE_MOVE cells. Walls stop the walker, a circle of
 *          MAZE_RADIUS; the two axes are stopped apart, so a move that meets a wall at a slant slides along it. Balls
 *          roll at constant speed and bounce off walls; they pass through the walker and through each other.
 * Exact    Positions and velocities are multiples of 2^-24 cells, so every sum and comparison of the state is exact:
 *          it is the same on every machine, `right*8,left*8` is the identity, and so is `forward*8,back*8` away from
 *          walls.
 *          Pictures, and the walks of maze_clips, which look ahead along rays, use arithmetic that another compiler may
 *          round differently: rarely, a byte differs by 1 or a walk turns elsewhere.
 *
 * Layout   A border wall round 7 x 7 cells: a perfect maze on the odd cells, four in ten of its inner walls removed,
 *          one or two rooms of 3 x 3 cells cleared, and half of the pillars that stand alone removed. All open cells
 *          are connected.
 * Walls    Six kinds, four in a world: a wall cell takes the kind of the nearest of four sites. A kind is two shades
 *          and one coarse pattern, so that motion shows: red bricks, green stripes, blue panels, yellow discs, white
 *          blocks, violet diamonds. All have a dark skirting, a light rail on top and a thin dark line at the borders
 *          of cells. Each of the four sides has its own light; colours fade to a dark blue-grey: at distance d,
 *          1 / (1 + (d / 5)^2) of a colour is left.
 * Floor    A checker of cells in two close shades; the ceiling is a vertical gradient. The horizon is the middle row,
 *          the eye at half the height of the walls.
 * Balls    None in half of the worlds, else one or two of different colours, with a highlight and a soft shadow. */
#ifndef RF_SAMPLES_MAZE_H
#define RF_SAMPLES_MAZE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    MAZE_NONE = 0,
    MAZE_FORWARD,
    MAZE_BACK,
    MAZE_LEFT, /* turns */
    MAZE_RIGHT,
    MAZE_STRAFE_LEFT,
    MAZE_STRAFE_RIGHT,
    MAZE_NUM_ACTIONS
};

#define MAZE_SIDE         9 /* cells a side, walls included */
#define MAZE_MAX_BALLS    2
#define MAZE_NUM_TEXTURES 6
#define MAZE_HEADINGS     48                 /* to a full turn */
#define MAZE_TURN         0.1308996938995747 /* 7.5 degrees */
#define MAZE_MOVE         0.125
#define MAZE_RADIUS       0.25
#define MAZE_BALL_RADIUS  0.1875
#define MAZE_FOV          1.2217304763960306 /* 70 degrees, horizontal; pixels are square */
#define MAZE_MAX_SIZE     4096               /* pixels a side of a frame */
#define MAZE_MAX_SAMPLES  8                  /* rays a side of a pixel */

typedef struct {
    double x, y, vx, vy; /* vx, vy in cells a frame */
    uint8_t color;
} maze_ball;

typedef struct {
    uint64_t seed;
    uint8_t wall[MAZE_SIDE][MAZE_SIDE]; /* [y][x]: 0 = open, else 1 + texture */
    double x, y;
    int heading;  /* 0..MAZE_HEADINGS-1, in MAZE_TURN to the left of +x */
    bool blocked; /* the last step was stopped by a wall (fully or in part) */
    int num_balls;
    maze_ball balls[MAZE_MAX_BALLS];
    int64_t time; /* steps taken */
} maze_world;

/* The walker starts at the centre of an open cell with open space ahead. */
void maze_init(maze_world *world, uint64_t seed);
/* An action out of range is taken as MAZE_NONE. */
void maze_step(maze_world *world, int action);
/* rgb [height][width][3]; samples x samples rays a pixel, box filter (training and comparisons use 3). Draws nothing if
 * a size is not in 1..MAZE_MAX_SIZE or samples not in 1..MAZE_MAX_SAMPLES. */
void maze_render(const maze_world *world, int width, int height, int samples, uint8_t *rgb);

/* "none", "forward", "back", "left", "right", "strafe-left", "strafe-right"; NULL out of range. */
const char *maze_action_name(int action);

/* Training clips, in parallel over clips (OpenMP where compiled with it): clip i is world and walk number first + i of
 * `seed`, whatever the batch. It starts at a random pose in a random open cell.
 * frames [clips][length][height][width][3]; actions [clips][length]: actions[c][i] is the action that led to frame i,
 * and actions[c][0] is MAZE_NONE. The walk is a mixture of held actions, see next_action in maze.c. Returns 0, or -1
 * for sizes that make no sense or a null buffer. */
int maze_clips(uint8_t *frames, uint8_t *actions, uint64_t seed, uint64_t first, int clips, int length, int width,
               int height, int samples);

#ifdef __cplusplus
}
#endif
#endif
