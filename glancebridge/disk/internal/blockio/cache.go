package blockio

import (
	"container/list"
	"context"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

// PageSize is the unit of a Cache in bytes: the largest block of any file system here, so that an aligned block never
// spans two pages.
const PageSize = 64 << 10

// Cache keeps the pages of a disk that were used last. It is for metadata: contents are read past it. It is not safe
// for concurrent use.
type Cache struct {
	d     Disk
	ctx   context.Context // of the walk under way: every loop over metadata comes by here
	pages map[int64]*list.Element
	order *list.List // front: used last
	limit int
}

type page struct {
	no   int64
	data []byte
}

// NewCache makes a cache of at most the given number of pages.
func NewCache(d Disk, pages int) *Cache {
	return &Cache{d: d, ctx: context.Background(), pages: make(map[int64]*list.Element), order: list.New(), limit: max(pages, 2)}
}

// Bind makes every later read end with the error of ctx once it is over.
func (c *Cache) Bind(ctx context.Context) { c.ctx = ctx }

// Size is the size of the disk in bytes.
func (c *Cache) Size() int64 { return c.d.Size() }

// Disk is the disk below, for reads past the cache.
func (c *Cache) Disk() Disk { return c.d }

// View gives n bytes at off. They must not be written to; they stay valid after the page has left the cache. Ranges
// inside one page are not copied.
func (c *Cache) View(off int64, n int) ([]byte, error) {
	if !Inside(off, int64(n), c.d.Size()) {
		return nil, verdict.Cut("%d bytes of metadata are wanted at byte %d of %d", n, off, c.d.Size())
	}
	if n == 0 {
		return nil, nil
	}
	no := off / PageSize
	at := int(off % PageSize)
	if at+n <= PageSize {
		p, err := c.page(no)
		if err != nil {
			return nil, err
		}
		return p[at : at+n : at+n], nil
	}
	buf := make([]byte, n)
	for done := 0; done < n; {
		p, err := c.page(no)
		if err != nil {
			return nil, err
		}
		done += copy(buf[done:], p[at:])
		no, at = no+1, 0
	}
	return buf, nil
}

func (c *Cache) page(no int64) ([]byte, error) {
	if err := c.ctx.Err(); err != nil {
		return nil, context.Cause(c.ctx)
	}
	if e, ok := c.pages[no]; ok {
		c.order.MoveToFront(e)
		return e.Value.(*page).data, nil
	}
	n := min(PageSize, c.d.Size()-no*PageSize)
	data := make([]byte, n)
	if _, err := c.d.ReadAt(data, no*PageSize); err != nil {
		return nil, err
	}
	if c.order.Len() >= c.limit {
		last := c.order.Back()
		delete(c.pages, last.Value.(*page).no)
		c.order.Remove(last)
	}
	c.pages[no] = c.order.PushFront(&page{no: no, data: data})
	return data, nil
}
