package fs

import (
	"os"
	"time"
)

// Stats are the counters of a mount since it was made, as .imgfs/stats.json has
// them.
type Stats struct {
	PID      int              `json:"pid"`
	Started  time.Time        `json:"started"`
	Fuse     map[string]int64 `json:"fuse"` // messages by operation
	Registry struct {
		Requests int64 `json:"requests"`
		Bytes    int64 `json:"bytes"`
		Retries  int64 `json:"retries"`
	} `json:"registry"`
	Cache struct {
		Limit int64 `json:"limit"` // bytes
		Used  int64 `json:"used"`
		Free  int64 `json:"free"`
	} `json:"cache"`
	Catalogue struct {
		Reads int64 `json:"reads"` // records
	} `json:"catalogue"`
	Errors int64 `json:"errors"` // that were noted, repetitions included
}

// Stats returns the counters.
func (s *Server) Stats() Stats { return s.fs.stats() }

// Events returns .imgfs/events as it is now: a JSON object on each line. The caller
// does not change it.
func (s *Server) Events() []byte {
	data, _ := s.fs.events.contents()
	return data
}

func (f *fileSystem) stats() Stats {
	s := Stats{PID: os.Getpid(), Started: f.started.UTC(), Fuse: map[string]int64{}}
	for i, name := range opNames {
		s.Fuse[name] = f.counts[i].Load()
	}
	for _, h := range f.store.Traffic().Hosts {
		s.Registry.Requests += h.Requests
		s.Registry.Bytes += h.Bytes
		s.Registry.Retries += h.Retries
	}
	u := f.store.Usage()
	s.Cache.Limit, s.Cache.Used, s.Cache.Free = u.Limit, u.Used, u.Free
	s.Catalogue.Reads = f.store.CatalogReads()
	s.Errors = f.errors.count()
	return s
}
