package directory

import (
	"time"

	"github.com/maypok86/otter/v2"
	"github.com/maypok86/otter/v2/stats"

	"github.com/kmehsm/kmehsm/directory/internal/packed"
	"github.com/kmehsm/kmehsm/internal/cache"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// A Cache keeps what Readers have read. All Readers share its size. It may be used concurrently.
type Cache struct {
	shards cache.Cache[cacheKey, *packedShard]
	parts  cache.Cache[cacheKey, *storedPart] // of revocations
}

// DefaultCacheBytes is the size of the Cache of a Reader that is given none.
const DefaultCacheBytes = 64 << 20

// NewCache makes a Cache of so many bytes. recorder counts its hits and misses; it may be nil.
func NewCache(bytes int64, recorder stats.Recorder) *Cache {
	const overhead = 256 // of an entry, about
	return &Cache{
		shards: cache.New(&otter.Options[cacheKey, *packedShard]{
			StatsRecorder: recorder, MaximumWeight: uint64(bytes - bytes/8),
			Weigher: func(_ cacheKey, s *packedShard) uint32 { return uint32(s.keys.Bytes() + overhead) },
			ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[cacheKey, *packedShard]) time.Duration {
				if e.Value.keys.Bytes() == 0 {
					return e.Key.reader.o.NegativeTTL
				}
				return 365 * 24 * time.Hour // a published shard never changes
			}),
		}),
		parts: cache.New(&otter.Options[cacheKey, *storedPart]{
			MaximumWeight: uint64(bytes / 8),
			Weigher:       func(_ cacheKey, p *storedPart) uint32 { return uint32(p.size + overhead) },
		}),
	}
}

// A cacheKey names a shard, or a part, of one reader: readers do not trust what others have verified.
type cacheKey struct {
	reader *Reader
	lot    string
	n      int
}

// A packedShard is a verified shard. One that is not in the store has no keys.
type packedShard struct {
	first int // position of the first key
	keys  packed.Keys
	pkg   strict.Base64
}
