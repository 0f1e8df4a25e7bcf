// Types that Grafana's dashboard as JSON must fit: scripts/test-monitoring compiles them with the dashboard, and runs nothing.
import type { Dashboard, Panel, RowPanel } from '@grafana/schema';
import type { Options as Stat } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type { Options as Table } from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type { Options as TimeSeries, FieldConfig as TimeSeriesField } from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import type { Options as StateTimeline, FieldConfig as StateTimelineField } from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';

// What a value of type T looks like in JSON: an enum of strings is one of its strings.
type Json<T> = unknown extends T ? unknown
  : T extends string ? `${T}`
  : T extends number | boolean | null | undefined ? T
  : T extends Array<infer E> ? Array<Json<E>>
  : { [K in keyof T]: Json<T[K]> };

interface Query {
  refId: string;
  datasource: { type: 'prometheus'; uid: '${datasource}' };
  editorMode: 'code';
  expr: string;
  legendFormat: string;
  instant: boolean;
  range: boolean;
  format: 'time_series' | 'table';
}

// Panel allows any options: these are narrowed by the panel's type.
type Of<Type extends string, Options, Field> = Json<Omit<Panel<never, Field>, 'options' | 'targets' | 'type' | 'transformations'>> & {
  type: Type;
  options: Json<Partial<Options>>;
  targets: Query[];
  transformations?: Array<{ id: string; options: unknown }>;
};

type AnyPanel =
  | Json<RowPanel>
  | Of<'stat', Stat, never>
  | Of<'table', Table, object>
  | Of<'timeseries', TimeSeries, TimeSeriesField>
  | Of<'state-timeline', StateTimeline, StateTimelineField>;

export type DashboardJson = Json<Omit<Dashboard, 'panels' | 'uid' | 'id'>> & { uid: 'outbox-relay'; panels: AnyPanel[] };
