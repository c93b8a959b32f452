package neutron

import (
	"context"
	"strings"
	"sync"
	"time"
)

// cache keeps values by key for a while. Callers that miss the same key at once share one fetch, and what one
// caller misses is fetched together.
type cache[V any] struct {
	ttl time.Duration
	now func() time.Time

	mu       sync.Mutex
	entries  map[string]entry[V]
	inflight map[string]chan struct{} // closed when the fetch under way has ended
	gen      uint64                   // grows with each forget, so that a fetch begun before it is not stored
}

type entry[V any] struct {
	value   V
	expires time.Time
}

func newCache[V any](ttl time.Duration) *cache[V] {
	return &cache[V]{ttl: ttl, now: time.Now, entries: map[string]entry[V]{}, inflight: map[string]chan struct{}{}}
}

// get returns the values of the keys; those that fetch does not find are missing in the result and not remembered.
func (c *cache[V]) get(ctx context.Context, keys []string, fetch func(ctx context.Context, missing []string) (map[string]V, error)) (map[string]V, error) {
	out := make(map[string]V, len(keys))
	pending := keys
	for {
		var missing, busy []string
		var wait chan struct{}
		c.mu.Lock()
		now := c.now()
		for _, k := range pending {
			if e, ok := c.entries[k]; ok && now.Before(e.expires) {
				out[k] = e.value
			} else if ch, ok := c.inflight[k]; ok {
				busy, wait = append(busy, k), ch
			} else {
				missing = append(missing, k)
			}
		}
		done := make(chan struct{})
		for _, k := range missing {
			c.inflight[k] = done
		}
		gen := c.gen
		c.mu.Unlock()

		if len(missing) > 0 {
			got, err := fetch(ctx, missing)
			c.mu.Lock()
			for _, k := range missing {
				if c.inflight[k] == done {
					delete(c.inflight, k)
				}
				if v, ok := got[k]; ok && err == nil {
					out[k] = v
					if c.gen == gen {
						c.entries[k] = entry[V]{v, c.now().Add(c.ttl)}
					}
				}
			}
			c.prune()
			c.mu.Unlock()
			close(done)
			if err != nil {
				return nil, err
			}
		}
		if len(busy) == 0 {
			return out, nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		pending = busy
	}
}

// prune drops what is out of date once the map has grown. The caller holds mu.
func (c *cache[V]) prune() {
	if len(c.entries) < 1024 {
		return
	}
	now := c.now()
	for k, e := range c.entries {
		if !now.Before(e.expires) {
			delete(c.entries, k)
		}
	}
}

// forget drops one key, or all when it is "".
func (c *cache[V]) forget(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gen++
	if key == "" {
		clear(c.entries)
		return
	}
	delete(c.entries, key)
}

// forgetSuffix drops the keys that end in sep and key, or all when key is "".
func (c *cache[V]) forgetSuffix(sep, key string) {
	if key == "" {
		c.forget("")
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gen++
	for k := range c.entries {
		if strings.HasSuffix(k, sep+key) {
			delete(c.entries, k)
		}
	}
}
