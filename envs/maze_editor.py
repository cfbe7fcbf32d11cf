"""The world of a maze designer: it builds a maze cell by cell, as PAIRED's teacher does (2012.02096, 2311.12716).

obs      image (H + 2, W + 2, 3) uint8, MiniGrid's (object, colour, state) codes of the whole map so far, its border included;
         time int32; noise (noise_dim,) float32, drawn anew from [0, 1) at every step
actions  a cell, y W + x
steps    `num_walls` walls, one a step (on a wall: nothing happens), then the goal, then the agent; each of these two removes a wall
         that is in its way, and an agent put onto the goal lands on a random free cell instead. The agent's direction is random.
reward   0: what a maze is worth is known only after others have played it
ends     after num_walls + 2 steps (terminated)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment
from envs.maze import CODES, EMPTY, GOAL, WALL, Level, one_hot, random_cell

AGENT_CODE = np.array([10, 0, 0], np.uint8)


class EditorState(NamedTuple):
    """A maze that is being built. A goal or an agent that is not placed yet stands outside the map, at (W, H)."""

    walls: jax.Array  # (H, W) bool
    goal_pos: jax.Array  # (2,) int32
    agent_pos: jax.Array  # (2,) int32
    agent_dir: jax.Array  # () int32
    time: jax.Array  # () int32


class EditorParams(NamedTuple):
    max_steps_in_episode: int | jax.Array


class EditorObservation(NamedTuple):
    image: jax.Array  # (H + 2, W + 2, 3) uint8
    time: jax.Array  # () int32
    noise: jax.Array  # (noise_dim,)


class MazeEditor(Environment):
    """The designer's world; `level_of(state)` is what it has built."""

    def __init__(self, height: int = 13, width: int = 13, num_walls: int = 60, noise_dim: int = 50):
        self.height, self.width, self.num_walls, self.noise_dim = height, width, num_walls, noise_dim

    @property
    def num_steps(self) -> int:
        """Steps of an episode: the walls, the goal, the agent."""
        return self.num_walls + 2

    @property
    def default_params(self) -> EditorParams:
        return EditorParams(self.num_steps)

    @property
    def num_actions(self) -> int:
        return self.height * self.width

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Discrete(self.num_actions)

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        image = spaces.Box(0, 10, (self.height + 2, self.width + 2, 3), jnp.uint8)
        noise = spaces.Box(0, 1, (self.noise_dim,), jnp.float32)
        return spaces.Dict({"image": image, "time": spaces.Discrete(self.num_steps + 1), "noise": noise})

    def reset_env(self, key, params=None):
        """An empty map -> obs, state."""
        key_dir, key_obs = jax.random.split(key)
        outside = jnp.array([self.width, self.height], jnp.int32)
        walls = jnp.zeros((self.height, self.width), bool)
        state = EditorState(walls, outside, outside, jax.random.randint(key_dir, (), 0, 4, jnp.int32), jnp.int32(0))
        return self.get_obs(state, params, key_obs), state

    def step_env(self, key, state: EditorState, action, params=None):
        """Puts the next thing into cell `action` -> obs, state, reward, terminated, info."""
        key_free, key_obs = jax.random.split(key)
        pos = jnp.stack([action % self.width, action // self.width]).astype(jnp.int32)
        cell, goal = one_hot(pos, state.walls.shape), one_hot(state.goal_pos, state.walls.shape)
        puts_goal, puts_agent = state.time == self.num_walls, state.time == self.num_walls + 1
        taken = puts_agent & (cell & goal).any()
        agent_pos = jnp.where(taken, random_cell(key_free, ~state.walls & ~goal), pos)
        state = EditorState(
            walls=jnp.where(puts_goal | puts_agent, state.walls & ~cell, state.walls | cell),
            goal_pos=jnp.where(puts_goal, pos, state.goal_pos),
            agent_pos=jnp.where(puts_agent, agent_pos, state.agent_pos),
            agent_dir=state.agent_dir,
            time=state.time + 1,
        )
        return self.get_obs(state, params, key_obs), state, jnp.float32(0), state.time >= self.num_steps, {}

    def get_obs(self, state: EditorState, params=None, key=None) -> EditorObservation:
        """The map so far; the noise is zero where no key is given."""
        shape = state.walls.shape
        goal, agent = one_hot(state.goal_pos, shape)[..., None], one_hot(state.agent_pos, shape)[..., None]
        image = jnp.where(state.walls[..., None], CODES[WALL], CODES[EMPTY])
        image = jnp.where(agent, jnp.asarray(AGENT_CODE).at[2].set(state.agent_dir.astype(jnp.uint8)), image)
        image = jnp.where(goal, CODES[GOAL], image)
        border = np.ones((shape[0] + 2, shape[1] + 2, 1), bool)
        border[1:-1, 1:-1] = False
        image = jnp.where(border, CODES[WALL], jnp.pad(image, [(1, 1), (1, 1), (0, 0)]))
        noise = jnp.zeros(self.noise_dim, jnp.float32) if key is None else jax.random.uniform(key, (self.noise_dim,), jnp.float32)
        return EditorObservation(image, state.time, noise)

    def level_of(self, state: EditorState) -> Level:
        """The maze of a finished episode."""
        return Level(state.walls, state.agent_pos, state.agent_dir, state.goal_pos)
